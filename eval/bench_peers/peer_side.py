"""transformers with kvpress, as the peer benchmark runs it; also a script that reports its own peak memory.

Nothing of kvx is imported here: a process that runs this file alone holds no second framework, so that its peak
memory is the peer's own.
"""

import argparse
import contextlib
import time
from pathlib import Path

import numpy as np

WINDOW = 64
"""Observation window of SnapKV on both sides."""


class PeerSide:
    """Prefill under one of kvpress's hooks, then greedy decoding as in kvpress's own pipeline.

    Args:
        path: a directory that transformers reads.
        threads: threads of torch.
    """

    def __init__(self, path: Path, threads: int):
        import torch
        import transformers

        torch.set_num_threads(threads)
        transformers.utils.logging.disable_progress_bar()
        self.model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.weights = sum(parameter.nbytes for parameter in self.model.parameters())

    def prefill(self, tokens: np.ndarray, method: str, kept: int) -> float:
        """Seconds for the prompt (1, T) and its compression to `kept` slots; the cache is held for `decode`.

        Args:
            method: "full", "snapkv", or "h2o" in kvpress's form: the mean over the queries, no recent window.
        """
        import kvpress
        import torch
        import transformers

        # kvpress keeps int(T * (1 - ratio)); half a token more makes that `kept` whatever the rounding.
        ratio = 1 - (kept + 0.5) / tokens.shape[1]
        press = {
            "full": lambda: contextlib.nullcontext,
            "snapkv": lambda: kvpress.SnapKVPress(ratio, window_size=WINDOW),
            "h2o": lambda: kvpress.ObservedAttentionPress(ratio),
        }[method]()
        # Only eager attention has the probabilities that ObservedAttentionPress reads.
        self.model.set_attn_implementation("eager" if method == "h2o" else "sdpa")
        self.cache = transformers.DynamicCache()
        self.next = tokens.shape[1]
        start = time.perf_counter()
        with torch.no_grad(), press(self.model):
            prompt = torch.from_numpy(tokens).long()
            logits = self.model(prompt, past_key_values=self.cache, logits_to_keep=1).logits
            self.token = logits[:, -1].argmax(dim=-1, keepdim=True)
        spent = time.perf_counter() - start
        self.model.set_attn_implementation("sdpa")
        assert all(layer.keys is not None and layer.keys.shape[2] == kept for layer in self.cache.layers)
        return spent

    def decode(self, count: int) -> float:
        """Seconds for `count` greedy tokens; the held cache grows by as many."""
        import torch

        start = time.perf_counter()
        with torch.no_grad():
            for _ in range(count):
                place = torch.tensor([[self.next]])
                logits = self.model(self.token, past_key_values=self.cache, position_ids=place).logits
                self.token = logits[:, -1].argmax(dim=-1, keepdim=True)
                self.next += 1
        return time.perf_counter() - start

    def step_bytes(self) -> int:
        """Bytes that one decode step has to read: all weights, and keys and values."""
        return self.weights + sum(
            array.nbytes for layer in self.cache.layers for array in (layer.keys, layer.values) if array is not None
        )


def peak_resident() -> int:
    """Peak resident bytes of this process image (Linux); rusage's figure would include the parent's at the fork.

    Raises:
        RuntimeError: a system that does not tell.
    """
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not tell a process its peak memory; /proc/self/status is needed")


def whole_job(make, arguments: list[str] | None = None) -> None:
    """Load, prefill and decode as the command line says, then print the peak; `make` builds a side."""
    parser = argparse.ArgumentParser()
    parser.add_argument("path", type=Path)
    parser.add_argument("prompt", type=Path, help="tokens (1, T), .npy")
    parser.add_argument("method")
    parser.add_argument("kept", type=int)
    parser.add_argument("steps", type=int)
    parser.add_argument("threads", type=int)
    given = parser.parse_args(arguments)
    side = make(given.path, given.threads)
    side.prefill(np.load(given.prompt), given.method, given.kept)
    side.decode(given.steps)
    print(peak_resident())


if __name__ == "__main__":
    whole_job(PeerSide)
