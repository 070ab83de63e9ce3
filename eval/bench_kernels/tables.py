"""The benchmark's tables as Markdown, as RESULTS.md holds them."""

from collections.abc import Iterable

from kvx.eval.bench_kernels.ahead_of_time import Compiled
from kvx.eval.bench_kernels.measure import Row
from kvx.eval.bench_kernels.numerics import Checked


def timed(rows: Iterable[Row]) -> str:
    """Times, bandwidths and ratios; an empty cell where there is no figure.

    "Of a peer's time" is a row's time over that of the fastest peer on the same call.
    """
    rows = list(rows)
    lines = [
        "| operation | shape | implementation | time, us | must move, MiB | GB/s | of a copy | of a peer's time |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    fastest: dict[tuple[str, str], float] = {}
    for row in rows:
        if row.peer and row.seconds is not None:
            call = row.operation, row.name
            fastest[call] = min(row.seconds, fastest.get(call, row.seconds))
    for row in rows:
        time = "" if row.seconds is None else f"{1e6 * row.seconds:.1f}"
        moved = "" if row.moved is None else f"{row.moved / 2**20:.1f}"
        speed = "" if row.moved is None or row.seconds is None else f"{row.moved / row.seconds / 1e9:.0f}"
        share = "" if row.of_copy is None else f"{row.of_copy:.2f}"
        peer = fastest.get((row.operation, row.name))
        ratio = "" if peer is None or row.seconds is None else f"{row.seconds / peer:.2f}"
        label = row.implementation + (f" {row.tuning}" if row.tuning else "")
        note = f" ({row.problem})" if row.problem else ""
        lines.append(
            f"| {row.operation} | {row.name} | {label}{note} | {time} | {moved} | {speed} | {share} | {ratio} |"
        )
    return "\n".join(lines) + "\n"


def checked(found: Iterable[Checked]) -> str:
    """Errors against the reference, and what is allowed."""
    lines = ["| call | implementation | error | allowed | |", "| --- | --- | ---: | ---: | --- |"]
    for each in found:
        verdict = "ok" if each.good else f"**wrong** {(each.problem or '').replace('|', '/')}"
        lines.append(f"| {each.call} | {each.implementation} | {each.error:.1e} | {each.allowed:.0e} | {verdict} |")
    return "\n".join(lines) + "\n"


def compiled(results: Iterable[Compiled]) -> str:
    """What the TPU compiler made of every call, a row a call and a chip."""
    lines = [
        "| operation | shape | chip | inputs, MiB | temporaries, MiB | scoped VMEM, KiB | copies | |",
        "| --- | --- | --- | ---: | ---: | ---: | --- | --- |",
    ]
    for each in results:
        head = f"| {each.operation} | {each.name} | {each.chip} | {each.argument_bytes / 2**20:.0f} |"
        if not each.fits:
            lines.append(f"{head} | | | does not fit, {each.argument_bytes / 2**30:.1f} GiB |")
            continue
        if each.problem:
            lines.append(f"{head} | | | does not compile: {each.problem.replace('|', '/')} |")
            continue
        moved = ", ".join(f"{kind} {size / 2**20:.0f} MiB" for kind, size in each.moved) or "none"
        verdict = "ok" if each.good else "**too much**"
        temporary, scoped = each.temporary_bytes / 2**20, each.scoped_bytes / 2**10
        lines.append(f"{head} {temporary:.2f} | {scoped:.0f} | {moved} | {verdict} |")
    return "\n".join(lines) + "\n"
