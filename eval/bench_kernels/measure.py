"""Rows of the kernel benchmark: time, bytes that must move, achieved bandwidth, and its ratio to a copy."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax

from kvx.eval.bench_kernels.calls import Call, candidates, implementations
from kvx.eval.bench_kernels.dense_peers import peer_times
from kvx.eval.bench_kernels.timing import seconds_per_call, turns


@dataclass(frozen=True)
class Row:
    """One implementation, or a peer, on one call.

    Attributes:
        seconds: median time of a call; None if it could not run.
        moved: bytes that must move; None for a peer that solves the dense problem.
        of_copy: achieved bandwidth as a share of a copy's on the same device.
        tuning: what the implementation was given, if not its default.
        problem: why there is no time.
        peer: whether it is a peer, on the same dense problem.
    """

    operation: str
    name: str
    implementation: str
    seconds: float | None
    moved: int | None = None
    of_copy: float | None = None
    tuning: str | None = None
    problem: str | None = None
    peer: bool = False

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def measure(
    calls: Sequence[Call], bandwidth: float, *, chosen: tuple[str, ...], tune: bool = False, peers: bool = False
) -> Iterator[Row]:
    """Every call with every implementation, and the peers that can do the job.

    Programs are compiled first, by all processors: compilation beside a timed call keeps the host from issuing the
    next one in time, and a kernel of 0.4 ms was seen at 3.7.

    Args:
        bandwidth: of a copy, bytes per second.
        chosen: implementations; those that an operation does not have are left out.
        tune: try all of an implementation's `CANDIDATES`, not only its default.
        peers: time dense attention of others where an entry says how to compare.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        work = [(call, [*_programs(call, chosen, tune, pool)], pool.submit(_builder, call)) for call in calls]
    for call, programs, builder in work:
        build = builder.result()
        inputs = [build(jax.random.key(seed)) for seed in range(turns(call.spec.argument_bytes()))]
        for row, program in programs:
            yield _timed(row, program, call, inputs, bandwidth)
        del inputs
        if peers and call.spec.compares is not None:
            for peer, seconds, problem in peer_times(call.spec.compares):
                name = call.spec.function or call.operation
                yield Row(name, call.spec.name, peer, seconds, problem=problem, peer=True)


def _programs(
    call: Call, chosen: tuple[str, ...], tune: bool, pool: ThreadPoolExecutor
) -> Iterator[tuple[Row, Future[Any]]]:
    for implementation in implementations(call.operation):
        if implementation in chosen:
            for tuning in (None, *candidates(call.operation, implementation)) if tune else (None,):
                bound = call.bound(implementation, **({} if tuning is None else {"tuning": tuning}))
                name = call.spec.function or call.operation
                row = Row(name, call.spec.name, implementation, None, tuning=None if tuning is None else str(tuning))
                yield row, pool.submit(_compiled, *bound)


def _compiled(function: Any, shapes: list[jax.ShapeDtypeStruct]) -> Any:
    return jax.jit(function).lower(shapes).compile()


def _builder(call: Call) -> Any:
    return jax.jit(lambda key: jax.tree.leaves(call.spec.build(key))).lower(jax.random.key(0)).compile()


def _timed(row: Row, program: Future[Any], call: Call, inputs: list[Any], bandwidth: float) -> Row:
    try:
        moved = call.spec.bytes_moved(call.function)
        seconds = seconds_per_call(program.result(), inputs)
    except Exception as error:  # one call that fails must not take the others with it
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return replace(row, problem=lines[0][:300])
    return replace(row, seconds=seconds, moved=moved, of_copy=moved / seconds / bandwidth)


def device_name() -> str:
    """What the figures were measured on."""
    device = jax.devices()[0]
    return f"{device.device_kind} ({jax.device_count()} device, {device.platform})"
