"""kvx against transformers with kvpress: decoding, prefill, peak memory (`python -m kvx.eval.bench_peers`).

One process holds both sides and alternates between them; figures are medians, judged as ratios. What else the machine
does is measured, and a row that others disturbed gets no ratio. Peak memory is measured in a process for each side.
"""

import argparse
import json
import os
import platform
import pydoc_data.topics
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODEL = "smollm2-135m-instruct"
PROMPT = 2048
KEPT = 256
STEPS = 16
"""Tokens of one timed decode run; runs go on from the cache of the one before."""

QUIET = 0.1
"""Share of the CPUs' time that others may take while a row is timed. The sides do not suffer alike beyond that: threads
of torch spin at barriers, and on two shared CPUs its decode step was seen at ten times its time on quiet ones."""

MEMORY = {"peak memory, snapkv": "snapkv", "peak memory, full": "full"}
DECODE = {"decode, 256 kept": ("snapkv", 2.0), "decode, 2048 kept": ("full", 2.0)}
PREFILL = {"prefill, snapkv": ("snapkv", 0.8), "prefill, h2o": ("h2o", 2.5)}
"""Row: method, and how many times as fast as the peer kvx should be."""


def main() -> None:
    """Parse the command line, measure, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(prog="python -m kvx.eval.bench_peers", description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="timed runs of each side and row")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of each side")
    parser.add_argument("--json", type=Path, help="write the results here too")
    parser.add_argument("--only", choices=["decode", "prefill", "memory"], help="one part of the comparison")
    arguments = parser.parse_args()
    if arguments.runs < 1 or arguments.runs > 7:
        parser.exit(2, f"runs={arguments.runs} is out of range; allowed: 1 to 7 (caches have room for 128 tokens)\n")
    _limit_threads(arguments.threads)
    results = measure(arguments.runs, arguments.threads, arguments.only)
    show(results)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


def measure(runs: int, threads: int, only: str | None = None) -> dict[str, Any]:
    """Every row of the comparison, and the circumstances; times in milliseconds, sizes in bytes."""
    import numpy as np

    from kvx.eval.bench_peers.kvx_side import KvxSide
    from kvx.eval.bench_peers.peer_side import PeerSide
    from kvx.models.load import load, save
    from kvx.progress import Steps

    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        path, prompt = Path(folder) / "model", Path(folder) / "prompt.npy"
        model, tokenizer = load(MODEL, dtype="float32")
        tokens = _prompt(tokenizer)
        save(model, tokenizer, path)
        np.save(prompt, tokens)
        del model
        rows: dict[str, Any] = {}
        parts = {"memory": MEMORY, "decode": DECODE, "prefill": PREFILL}
        parts = {part: named for part, named in parts.items() if only in (None, part)}
        with Steps(sum(map(len, parts.values())), None) as step:
            # Memory before the sides are made: three models at once would be more than a small machine has.
            for name, method in parts.pop("memory", {}).items():
                step(name)
                rows[name] = _peaks(path, prompt, threads, method, runs)
            sides = {"kvx": KvxSide(path, threads), "peer": PeerSide(path, threads)} if parts else {}
            for part, named in parts.items():
                measured = {"decode": _decode, "prefill": _prefill}[part]
                for name, (method, goal) in named.items():
                    step(name)
                    rows[name] = measured(sides, tokens, method, runs, goal)
    bandwidth = read_bandwidth()
    for row in rows.values():
        if "step_bytes" in row:
            row["floor"] = {side: 1e3 * size / bandwidth for side, size in row["step_bytes"].items()}
    return {
        "model": MODEL, "prompt": PROMPT, "runs": runs, "threads": threads, "machine": platform.machine(),
        "cpus": os.cpu_count(), "load_before": load_before, "load_after": os.getloadavg()[0],
        "read_bandwidth": bandwidth, "rows": rows,
    }  # fmt: skip


def _decode(sides: dict[str, Any], tokens: Any, method: str, runs: int, goal: float) -> dict[str, Any]:
    kept = tokens.shape[1] if method == "full" else KEPT
    for side in sides.values():
        side.prefill(tokens, method, kept)
        side.decode(STEPS)  # compiles, warms up
    once = {name: (lambda side=side: side.decode(STEPS) / STEPS) for name, side in sides.items()}
    return _row(once, runs, goal) | {"step_bytes": {name: side.step_bytes() for name, side in sides.items()}}


def _prefill(sides: dict[str, Any], tokens: Any, method: str, runs: int, goal: float) -> dict[str, Any]:
    def once(side):
        return lambda: side.prefill(tokens, method, KEPT)

    sides["kvx"].prefill(tokens, method, KEPT)  # compiles
    return _row({name: once(side) for name, side in sides.items()}, runs, goal)


def _alternate(measures: dict[str, Callable[[], float]], runs: int) -> dict[str, list[float]]:
    """Milliseconds of each side's runs, the sides taking turns."""
    times: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(runs):
        for name, once in measures.items():
            times[name].append(1e3 * once())
    return times


def _others_share(busy: float, own: float, seconds: float) -> float | None:
    """Share of all CPUs' time taken by other processes; None where the system does not tell."""
    return None if busy < 0 else max(0.0, busy - own) / (seconds * (os.cpu_count() or 1))


def _busy_seconds() -> float:
    """CPU seconds that all processes have used since the system started (Linux); -1 elsewhere."""
    if not os.path.exists("/proc/stat"):
        return -1.0
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _row(measures: dict[str, Callable[[], float]], runs: int, goal: float) -> dict[str, Any]:
    busy, own, start = _busy_seconds(), time.process_time(), time.perf_counter()
    times = _alternate(measures, runs)
    spent = time.perf_counter() - start
    others = _others_share(_busy_seconds() - busy if busy >= 0 else -1.0, time.process_time() - own, spent)
    medians = {name: statistics.median(found) for name, found in times.items()}
    return {
        "unit": "ms", "median": medians, "all": times, "times_as_fast": medians["peer"] / medians["kvx"], "goal": goal,
        "others_share": others, "quotable": others is not None and others <= QUIET,
    }  # fmt: skip


def read_bandwidth(size: int = 512 << 20, tries: int = 7) -> float:
    """Bytes a second that this process can read from memory with all its threads: the best of a few sums."""
    import jax
    import jax.numpy as jnp

    array = jnp.ones(size // 4, jnp.float32)
    # Rows, so that the sum is split over threads.
    total = jax.jit(lambda x: jnp.sum(x.reshape(64, -1), axis=1))
    total(array).block_until_ready()
    times = []
    for _ in range(tries):
        start = time.perf_counter()
        total(array).block_until_ready()
        times.append(time.perf_counter() - start)
    return size / min(times)


def _peaks(path: Path, prompt: Path, threads: int, method: str, runs: int) -> dict[str, Any]:
    """Peak resident bytes of processes that load, prefill and decode, for each side."""
    folder = Path(__file__).parent
    length = PROMPT if method == "full" else KEPT
    peaks: dict[str, list[int]] = {"kvx": [], "peer": []}
    for side in [*peaks] * runs:
        # Run as a plain file, so that the peer's process imports nothing of kvx.
        command = [sys.executable, "-P", str(folder / f"{side}_side.py"), str(path), str(prompt), method]
        command += [str(length), str(STEPS), str(threads)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
        if done.returncode:
            raise RuntimeError(f"the {side} side failed with status {done.returncode}:\n{done.stderr[-2000:]}")
        peaks[side].append(int(done.stdout.splitlines()[-1]))
    medians = {side: statistics.median(found) for side, found in peaks.items()}
    return {
        "unit": "bytes", "median": medians, "all": peaks,
        "share_of_peer": medians["kvx"] / medians["peer"], "goal": 1.0,
    }  # fmt: skip


def _prompt(tokenizer: Any) -> Any:
    import numpy as np

    text = "\n".join(pydoc_data.topics.topics[name] for name in ("assignment", "class", "compound", "exceptions"))
    return np.asarray([tokenizer.encode(text)[:PROMPT]], np.int32)


def _limit_threads(threads: int) -> None:
    """This process on so many CPUs and no accelerator, before a backend counts them; XLA has no other switch."""
    if hasattr(os, "sched_getaffinity"):
        mine = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, mine[:threads])
    import jax

    jax.config.update("jax_platforms", "cpu")


def show(results: dict[str, Any]) -> None:
    """Print the results as a table."""
    from rich.console import Console
    from rich.table import Table

    gigabytes = results["read_bandwidth"] / 1e9
    table = Table(
        title=f"{results['model']}, float32, batch 1, {results['prompt']} prompt tokens, {results['threads']} threads",
        caption=f"medians of {results['runs']} alternating runs; load {results['load_before']:.1f} before and "
        f"{results['load_after']:.1f} after, on {results['cpus']} CPUs; memory read at {gigabytes:.1f} GB/s; "
        f"MiB a step: weights and cache; floor: those bytes at that rate; disturbed: others took more than {QUIET:.0%} "
        "of the CPUs while a row was timed, so that its ratio says nothing",
    )
    for name in ("", "kvx", "peer", "ratio", "goal", "MiB a step (kvx, peer)", "floor (kvx, peer)", "others' CPU"):
        table.add_column(name, justify="left" if not name else "right")
    for name, row in results["rows"].items():
        if row["unit"] == "ms":
            ratio, goal = f"{row['times_as_fast']:.2f}x", f">= {row['goal']:.1f}x"
            if not row["quotable"]:
                ratio = "disturbed"
            cells = [f"{row['median'][side]:.1f} ms" for side in ("kvx", "peer")]
            taken = "?" if row["others_share"] is None else f"{row['others_share']:.0%}"
        else:
            ratio, goal = f"{row['share_of_peer']:.2f}", f"< {row['goal']:.1f}"
            cells = [f"{row['median'][side] / 2**20:.0f} MiB" for side in ("kvx", "peer")]
            taken = ""
        moved = floor = ""
        if "step_bytes" in row:
            moved = ", ".join(f"{row['step_bytes'][side] / 2**20:.0f}" for side in ("kvx", "peer"))
            floor = ", ".join(f"{row['floor'][side]:.1f}" for side in ("kvx", "peer")) + " ms"
        table.add_row(name, *cells, ratio, goal, moved, floor, taken)
    Console().print(table)


if __name__ == "__main__":
    main()
