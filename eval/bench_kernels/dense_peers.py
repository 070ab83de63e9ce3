"""Dense attention of others on the same problem and device: cuDNN through JAX, PyTorch's SDPA and flex_attention."""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kvx.eval.bench_kernels.timing import RUN, RUNS, seconds_per_call


def peer_times(problem: Mapping[str, int | bool]) -> Iterator[tuple[str, float | None, str | None]]:
    """(peer, seconds, why not) for every peer that is installed; bfloat16, the same shapes.

    Args:
        problem: B, H, G, T, S, D, causal, as in `ArgSpec.compares`.
    """
    peers: dict[str, Callable[[Mapping[str, Any]], float]] = {
        "cuDNN": _cudnn,
        "PyTorch SDPA": _sdpa,
        "PyTorch flex_attention": _flex,
    }
    for name, measure in peers.items():
        try:
            yield name, measure(problem), None
        except Exception as error:  # a peer that cannot do the job is a result too
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            yield name, None, reason[:160]


def _cudnn(problem: Mapping[str, Any]) -> float:
    p = problem
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((p["B"], p["T"], p["H"], p["D"]), (p["B"], p["S"], p["G"], p["D"]), (p["B"], p["S"], p["G"], p["D"]))
    arrays = tuple(jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True))

    def attend(arrays):
        return jax.nn.dot_product_attention(*arrays, is_causal=bool(p["causal"]), implementation="cudnn")

    return seconds_per_call(jax.jit(attend), [arrays])


def _torch_arrays(problem: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    import torch

    p = problem
    shapes = ((p["B"], p["H"], p["T"], p["D"]), (p["B"], p["G"], p["S"], p["D"]), (p["B"], p["G"], p["S"], p["D"]))
    return tuple(torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes)  # type: ignore[return-value]


def _sdpa(problem: Mapping[str, Any]) -> float:
    import torch

    arrays = _torch_arrays(problem)

    def attend():
        return torch.nn.functional.scaled_dot_product_attention(*arrays, is_causal=problem["causal"], enable_gqa=True)

    return _torch_seconds(attend)


def _flex(problem: Mapping[str, Any]) -> float:
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    arrays = _torch_arrays(problem)
    length, size = problem["T"], problem["S"]
    mask = None
    if problem["causal"]:
        mask = create_block_mask(lambda b, h, i, j: i + (size - length) >= j, None, None, length, size, device="cuda")
    compiled = torch.compile(flex_attention)
    return _torch_seconds(lambda: compiled(*arrays, block_mask=mask, enable_gqa=True))


def _torch_seconds(attend: Callable[[], Any]) -> float:
    import statistics

    import torch

    with torch.no_grad():
        for _ in range(3):
            attend()
        torch.cuda.synchronize()
        start = time.perf_counter()
        attend()
        torch.cuda.synchronize()
        count = max(1, min(200, int(RUN / max(time.perf_counter() - start, 1e-6))))
        times = []
        for _ in range(RUNS):
            start = time.perf_counter()
            for _ in range(count):
                attend()
            torch.cuda.synchronize()
            times.append((time.perf_counter() - start) / count)
    return statistics.median(times)
