"""kvx, as the peer benchmark runs it; also a script that reports its own peak memory."""

import sys
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # jax maps libtpu's library (100 MiB) wherever the extra for ahead-of-time tests is installed, also on a CPU.
    sys.modules["libtpu"] = None  # type: ignore[assignment]

import jax
import jax.numpy as jnp
import numpy as np

import kvx
from kvx.eval.bench_peers.peer_side import WINDOW, whole_job
from kvx.models.load import load


class KvxSide:
    """kvx's prefill and compiled generation loop; the same calls as `kvx.eval.bench_peers.peer_side.PeerSide`.

    Args:
        path: a directory that `kvx.load` reads.
        threads: ignored; XLA takes the CPUs of its process's affinity.
    """

    def __init__(self, path: Path, threads: int):
        self.model, _ = load(path, dtype="float32")
        self.weights = sum(leaf.nbytes for leaf in jax.tree.leaves(self.model))
        self.cache: Any = None

    def prefill(self, tokens: np.ndarray, method: str, kept: int) -> float:
        """Seconds for the prompt (1, T) and its compression to `kept` slots; the cache is held for `decode`."""
        self.cache = None
        self.policy = {
            "full": lambda: kvx.policies.full(),
            "snapkv": lambda: kvx.policies.snapkv(kept, window=WINDOW),
            "h2o": lambda: kvx.policies.h2o(kept, average="mean", recent=0),
        }[method]()
        start = time.perf_counter()
        logits, self.cache = jax.block_until_ready(kvx.prefill(self.model, tokens, self.policy, max_new_tokens=128))
        spent = time.perf_counter() - start
        self.token = np.asarray(jnp.argmax(logits, axis=-1))[:, None].astype(np.int32)
        return spent

    def decode(self, count: int) -> float:
        """Seconds for `count` greedy tokens; the held cache grows by as many."""
        start = time.perf_counter()
        result = jax.block_until_ready(
            kvx.generate(self.model, self.token, policy=self.policy, cache=self.cache, max_new_tokens=count)
        )
        spent = time.perf_counter() - start
        self.cache, self.token = result.cache, np.asarray(result.tokens[:, -1:])
        return spent

    def step_bytes(self) -> int:
        """Bytes that one decode step has to read: all weights, and what the stores read of the cache."""
        return self.weights + self.cache.bytes_read()


if __name__ == "__main__":
    whole_job(KvxSide)
