"""`kvx bench`: what kernels cost on the device at hand, and what the TPU compiler makes of them without one."""

from pathlib import Path
from typing import Annotated

import typer

SHAPES = ("NUMERIC", "CI", "AOT", "GPU")

bench = typer.Typer(
    help="Benchmarks: kernels on this device, or compiled for TPUs that are not there.", no_args_is_help=True
)


@bench.callback()
def _group() -> None:
    """Benchmarks."""


@bench.command()
def kernels(
    only: Annotated[list[str] | None, typer.Option("--only", help="An operation; may be repeated.")] = None,
    matching: Annotated[
        list[str] | None, typer.Option("--matching", help="Text in the name of a shape; may be repeated.")
    ] = None,
    shapes: Annotated[
        str,
        typer.Option("--shapes", help="NUMERIC, CI, AOT (the realistic ones) or GPU (those that a TPU does not take)."),
    ] = "AOT",
    aot: Annotated[bool, typer.Option("--aot", help="Compile for TPUs instead of timing; needs libtpu.")] = False,
    chip: Annotated[list[str] | None, typer.Option("--chip", help="v5e, v5p, v6e; may be repeated.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Compare with the reference instead of timing.")] = False,
    tune: Annotated[bool, typer.Option("--tune", help="Try every tuning that an implementation offers.")] = False,
    peers: Annotated[bool, typer.Option("--peers", help="Time cuDNN and PyTorch on the same problems.")] = False,
    implementation: Annotated[
        list[str] | None, typer.Option("--implementation", help="xla, triton, mosaic_tpu; may be repeated.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Also write the table here, as Markdown.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Time kernels, check them, or compile them ahead of time.

    Prints per operation and shape the median time, the bytes that must move, the bandwidth, and its ratio to a copy on
    the same device. With --aot: scoped VMEM, temporaries and copies of the program that a TPU would run; status 1 if
    one is refused or makes anything of the cache's size.

    Examples:

        kvx bench kernels --only decode_attention --shapes CI

        kvx bench kernels --aot --chip v5e --out kernels.md

        kvx bench kernels --check --implementation triton
    """
    from kvx.destinations import check_file, make_folder
    from kvx.errors import BadInput, unknown
    from kvx.eval.bench_kernels.calls import calls, implementations
    from kvx.kernels.arg_spec import CHIPS

    if shapes not in SHAPES:
        raise unknown("shapes", shapes, SHAPES)
    for name in chip or ():
        if name not in CHIPS:
            raise unknown("chip", name, CHIPS)
    chosen = list(calls("NUMERIC" if check else shapes, tuple(only or ()), tuple(matching or ("",))))
    if not chosen:
        raise BadInput(f"matching is {matching}, which no shape of the chosen operations contains")
    known = sorted({name for call in chosen for name in implementations(call.operation)})
    for name in implementation or ():
        if name not in known:
            raise unknown("implementation", name, known)
    if out is not None:
        make_folder(out.parent, "out")
        check_file(out, "out")
    if aot:
        _ahead_of_time(chosen, tuple(chip or CHIPS), out, json)
    elif check:
        _checked(chosen, tuple(implementation or ()), out, json)
    else:
        _timed(chosen, tuple(implementation or ()), tune, peers, out, json)


def _default_implementations(given: tuple[str, ...]) -> tuple[str, ...]:
    from kvx.kernels.implementations import PREFERENCE, target_platform

    return given or tuple(name for name in PREFERENCE[target_platform()] if name != "reference")


def _ahead_of_time(chosen, chips: tuple[str, ...], out: Path | None, json: bool) -> None:
    from dataclasses import asdict

    from kvx.eval.bench_kernels import tables
    from kvx.eval.bench_kernels.ahead_of_time import compile_calls
    from kvx.eval.bench_kernels.calls import implementations
    from kvx.progress import Steps

    chosen = [call for call in chosen if "mosaic_tpu" in implementations(call.operation)]
    results = []
    with Steps(len(chosen) * len(chips), None) as step:
        for each in compile_calls(chosen, chips):
            step(f"{each.chip} {each.operation}: {each.name}")
            results.append(each)
            _write(tables.compiled(results), out)
    _print(tables.compiled(results), [asdict(each) for each in results], json)
    if not all(each.good for each in results):
        raise typer.Exit(1)


def _checked(chosen, given: tuple[str, ...], out: Path | None, json: bool) -> None:
    from dataclasses import asdict

    from kvx.eval.bench_kernels import tables
    from kvx.eval.bench_kernels.numerics import check

    found = []
    for each in check(chosen, _default_implementations(given)):
        found.append(each)
        _write(tables.checked(found), out)
    _print(tables.checked(found), [asdict(each) for each in found], json)
    if not all(each.good for each in found):
        raise typer.Exit(1)


def _timed(chosen, given: tuple[str, ...], tune: bool, peers: bool, out: Path | None, json: bool) -> None:
    import jax

    from kvx.eval.bench_kernels import tables
    from kvx.eval.bench_kernels.measure import device_name, measure
    from kvx.eval.bench_kernels.timing import copy_bandwidth
    from kvx.progress import Steps

    bandwidth = copy_bandwidth(2**30 if jax.default_backend() != "cpu" else 2**28)
    head = f"{device_name()}, jax {jax.__version__}; a copy moves {bandwidth / 1e9:.0f} GB/s.\n\n"
    rows = []
    with Steps(len(chosen), None) as step:
        for row in measure(chosen, bandwidth, chosen=_default_implementations(given), tune=tune, peers=peers):
            if not rows or rows[-1].name != row.name:
                step(f"{row.operation}: {row.name}")
            rows.append(row)
            _write(head + tables.timed(rows), out)
    everything = {"device": device_name(), "copy": bandwidth, "rows": [row.as_json() for row in rows]}
    _print(head + tables.timed(rows), everything, json)


def _write(table: str, out: Path | None) -> None:
    """As far as it is: what a long run has found is there if it is cut short."""
    if out is not None:
        out.write_text(table)


def _print(table: str, values, json: bool) -> None:
    from json import dumps

    print(dumps(values, indent=2) if json else table)
