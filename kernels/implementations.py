"""Which implementation of an operation runs: the named one, or the best that takes these arguments on this platform.

A named implementation never falls back: if it cannot take the arguments, it says why. Without a name the platform that
is compiled for decides, in the order of `PREFERENCE`. That platform is the default backend, or what `compiling_for`
says: a program compiled ahead of time for a TPU is traced on a machine that has none.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax

PREFERENCE: dict[str, tuple[str, ...]] = {
    "tpu": ("mosaic_tpu", "xla", "reference"),
    "gpu": ("triton", "xla", "reference"),
    "cpu": ("xla", "reference"),
}
"""Implementations by platform, best first."""

KERNELS = ("mosaic_tpu", "triton")
"""Written in Pallas: each refuses some arguments, and XLA cannot split them over a mesh (`kvx.kernels.over_mesh`)."""

LANES = 128
"""Numbers of a row of a TPU's memory and vector unit: a last axis is filled up to whole rows."""

_target: ContextVar[str | None] = ContextVar("target platform of kernels", default=None)


@contextmanager
def compiling_for(platform: str) -> Iterator[None]:
    """Trace for this platform ("tpu", "gpu", "cpu") whatever the default backend is.

    What is traced inside is cached by JAX like everything else: trace a function for one platform only.
    """
    if platform not in PREFERENCE:
        raise ValueError(f"platform is {platform!r}, allowed are {', '.join(PREFERENCE)}")
    token = _target.set(platform)
    try:
        yield
    finally:
        _target.reset(token)


def target_platform() -> str:
    """The platform that is compiled for: "tpu", "gpu" or "cpu"."""
    backend = _target.get() or jax.default_backend()
    return backend if backend in PREFERENCE else "cpu"


def choose(
    operation: str,
    implementation: str | None,
    offered: Mapping[str, Callable[..., Any]],
    refusal: Callable[[str], str | None] = lambda name: None,
) -> Callable[..., Any]:
    """The function that runs.

    Args:
        operation: its name, for messages.
        implementation: a name in `offered`, or None.
        offered: implementations by name.
        refusal: why the named one cannot take these arguments, as a sentence; None if it can.

    Raises:
        ValueError: a name that is not offered, or a named implementation that cannot take the arguments.
    """
    if implementation is None:
        fitting = (name for name in PREFERENCE[target_platform()] if name in offered and refusal(name) is None)
        return offered[next(fitting)]
    if implementation not in offered:
        raise ValueError(f"implementation is {implementation!r}, {operation} has {', '.join(offered)}")
    if reason := refusal(implementation):
        raise ValueError(f"implementation={implementation!r} of {operation} cannot run: {reason}")
    return offered[implementation]
