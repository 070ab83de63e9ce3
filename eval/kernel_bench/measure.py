"""Rows of the kernel benchmark: time, bytes that must move, achieved bandwidth, and its ratio to a copy."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax

from kvx.eval.kernel_bench.calls import Call, candidates, implementations
from kvx.eval.kernel_bench.dense_peers import peer_times
from kvx.eval.kernel_bench.timing import seconds_per_call, turns


@dataclass(frozen=True)
class Row:
    """One implementation, or a peer, on one call.

    Attributes:
        seconds: median time of a call; None if it could not run.
        moved: bytes that must move; None for a peer that solves the dense problem.
        of_copy: achieved bandwidth as a share of a copy's on the same device.
        tuning: what the implementation was given, if not its default.
        problem: why there is no time.
    """

    operation: str
    name: str
    implementation: str
    seconds: float | None
    moved: int | None = None
    of_copy: float | None = None
    tuning: str | None = None
    problem: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def measure(
    call: Call, bandwidth: float, *, chosen: tuple[str, ...], tune: bool = False, peers: bool = False
) -> Iterator[Row]:
    """One call with every implementation, and the peers that can do the job.

    Args:
        bandwidth: of a copy, bytes per second.
        chosen: implementations; those that an operation does not have are left out.
        tune: try all of an implementation's `CANDIDATES`, not only its default.
        peers: time dense attention of others where an entry says how to compare.
    """
    inputs = [call.spec.arrays(seed) for seed in range(turns(call.spec.argument_bytes()))]
    for implementation in implementations(call.operation):
        if implementation in chosen:
            tunings = (None, *candidates(call.operation, implementation)) if tune else (None,)
            for tuning in tunings:
                yield _row(call, implementation, tuning, inputs, bandwidth)
    del inputs
    if peers and call.spec.compares is not None:
        for peer, seconds, problem in peer_times(call.spec.compares):
            yield Row(call.operation, call.spec.name, peer, seconds, problem=problem)


def _row(call: Call, implementation: str, tuning: Any, inputs: list[Any], bandwidth: float) -> Row:
    name = call.spec.function or call.operation
    row = Row(name, call.spec.name, implementation, None, tuning=None if tuning is None else str(tuning))
    function = call.bound(implementation, **({} if tuning is None else {"tuning": tuning}))
    try:
        moved = call.spec.bytes_moved(call.function)
        seconds = seconds_per_call(function, inputs)
    except Exception as error:  # one call that fails must not take the others with it
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return replace(row, problem=lines[0][:300])
    return replace(row, seconds=seconds, moved=moved, of_copy=moved / seconds / bandwidth)


def device_name() -> str:
    """What the figures were measured on."""
    device = jax.devices()[0]
    return f"{device.device_kind} ({jax.device_count()} device, {device.platform})"
