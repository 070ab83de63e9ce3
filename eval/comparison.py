"""What a comparison found: records, their JSON with everything needed to repeat it, and the table."""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import kvx
from kvx.destinations import replace_file
from kvx.errors import BadInput
from kvx.eval.job import FULL
from kvx.eval.records import Record
from kvx.eval.summary import FIDELITY


@dataclass
class PolicyResult:
    """One policy's row.

    Attributes:
        policy: its text.
        bounded: whether the cache stays within its budget however long the generation.
        cache_bytes: resident bytes of the cache after the longest passkey prompt, room for the answer included.
        bytes_per_token: of them, a token of that prompt.
        share_of_full: of the full cache's bytes in its own dtype, under the same conditions.
        share_of_bf16: of what the full cache would take in bfloat16.
        bytes_read: bytes of the cache that a decode step touches there.
        policy_bytes: of its learned arrays, not in the above.
        perplexity: of held-out prose through the decode path.
        perplexity_share_of_bf16: bytes of the cache in that workload, as a share of a bfloat16 full cache's.
        agnostic, aware: share of passkeys found, with the question after or before compression.
        prefill_seconds: one prompt of the timed length, compilation excluded.
        tokens_per_second: decoding one row after such a prompt, layer by layer, compilation excluded.
        answers: every passkey prompt's outcome.
    """

    policy: str
    bounded: bool = False
    cache_bytes: int = 0
    bytes_per_token: float = 0.0
    share_of_full: float = 0.0
    share_of_bf16: float = 0.0
    bytes_read: int = 0
    policy_bytes: int = 0
    perplexity: float = float("nan")
    perplexity_share_of_bf16: float = 0.0
    agnostic: float = float("nan")
    aware: float = float("nan")
    prefill_seconds: float = float("nan")
    tokens_per_second: float = float("nan")
    answers: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Results:
    """A comparison.

    Attributes:
        model: as the user named it.
        workload: lengths, counts and budgets.
        text: the prose's name and SHA-256.
        seed: of keys, depths and calibration.
        command: how to run it again.
        versions, commit: of what computed it.
        device: what ran it.
        policies: the rows, the full cache first.
        phases: seconds by phase.
        seconds: of the whole job.
    """

    model: str
    workload: dict[str, Any]
    text: dict[str, str]
    seed: int
    command: str
    versions: dict[str, str]
    commit: str | None
    device: dict[str, Any]
    policies: list[PolicyResult] = field(default_factory=list)
    phases: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: float = 0.0

    def as_json(self) -> str:
        """Everything; numbers that are not finite as null."""
        return json.dumps(_finite(asdict(self)), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def write(self, folder: Path) -> None:
        """results.json and frontier.png in `folder`, each complete or not at all.

        Raises:
            BadInput: a folder that cannot be written.
        """
        from kvx.eval.frontier_plot import frontier_png

        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, content in (("results.json", self.as_json().encode()), ("frontier.png", frontier_png(self))):
                replace_file(folder / name, content)
        except OSError as error:
            raise BadInput(f"out={str(folder)!r} cannot be written: {error.strerror or error}") from None


def policy_results(policies: Sequence[kvx.Policy], records: Sequence[Record], longest: int) -> list[PolicyResult]:
    """One row a policy but for its times, from an evaluation's records.

    Args:
        longest: the passkey length whose bytes are told.
    """
    return [
        _row(policy, [each for each in records if each.policy == policy.text], records, longest) for policy in policies
    ]


def print_results(results: Results, as_json: bool = False, timings: bool = False) -> None:
    """The table, or the JSON, on standard output."""
    if as_json:
        print(results.as_json(), end="")
        return
    # A table in a file or a pipe should not be cut to the width of a terminal that is not there.
    console = Console(width=None if Console().is_terminal else 170)
    console.print(table(results))
    longest, timed = results.workload["longest"], results.workload["timed_length"]
    console.print(
        f"Bytes: one prompt of {longest} tokens and room for its answer. Perplexity: {results.workload['documents']} "
        f"documents, {results.workload['prompt']} tokens prefilled, {results.workload['forced']} forced through the "
        f"decode path ('there': cache bytes in that workload, of bf16). Passkey: question after / before compression. "
        f"Prefill of {timed} tokens and decoding after them, layer by layer: one row, compilation excluded.",
        highlight=False,
    )
    if timings:
        console.print(timing_table(results))


def table(results: Results) -> Table:
    """One row a policy."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    shown.add_column("policy", no_wrap=True)
    columns = ("cache MiB", "B/token", "of full", "of bf16", "read MiB", "perplexity", "there", "passkey", "prefill s",
               "tokens/s")  # fmt: skip
    for column in columns:
        shown.add_column(column, justify="right", no_wrap=True)
    for row in results.policies:
        shown.add_row(
            row.policy,
            f"{row.cache_bytes / 2**20:.2f}",
            f"{row.bytes_per_token:.0f}",
            f"{row.share_of_full:.1%}",
            f"{row.share_of_bf16:.1%}",
            f"{row.bytes_read / 2**20:.2f}",
            f"{row.perplexity:.3f}",
            f"{row.perplexity_share_of_bf16:.1%}",
            f"{row.agnostic:.2f} / {row.aware:.2f}",
            f"{row.prefill_seconds:.2f}",
            f"{row.tokens_per_second:.1f}",
        )
    return shown


def timing_table(results: Results) -> Table:
    """Seconds by phase."""
    shown = Table("phase", box=None, pad_edge=False, header_style="bold")
    for column in ("wall s", "cpu s", "compile s"):
        shown.add_column(column, justify="right")
    for name, seconds in results.phases.items():
        shown.add_row(name, *(f"{seconds[kind]:.1f}" for kind in ("wall", "cpu", "compile")))
    shown.add_row("everything", f"{results.seconds:.1f}", "", "")
    return shown


def _row(policy: kvx.Policy, found: list[Record], records: Sequence[Record], longest: int) -> PolicyResult:
    passkeys = [each for each in found if each.cell.task != FIDELITY]
    texts = [each for each in found if each.cell.task == FIDELITY]
    at = next(each for each in passkeys if each.cell.length == longest and each.cell.mode == "agnostic")
    full = next(each for each in records if each.policy == FULL and each.cell == at.cell)
    scores = {
        mode: statistics.fmean(each.score for each in passkeys if each.cell.mode == mode)
        for mode in ("agnostic", "aware")
    }
    return PolicyResult(
        policy=policy.text,
        bounded=policy.bounded,
        cache_bytes=at.cache_bytes,
        bytes_per_token=at.cache_bytes / at.tokens,
        share_of_full=at.cache_bytes / full.cache_bytes,
        share_of_bf16=at.share,
        bytes_read=at.bytes_read,
        policy_bytes=policy.nbytes,
        # All documents are equally long, so this is the perplexity over all of their tokens.
        perplexity=math.exp(statistics.fmean(math.log(each.measures["perplexity"]) for each in texts)),
        perplexity_share_of_bf16=texts[0].share,
        **scores,
        answers=[
            {"length": each.cell.length, "depth": each.depth, "aware": each.cell.mode == "aware",
             "key": each.expected[0][0], "answer": each.answers[0], "correct": each.score == 1.0}
            for each in passkeys
        ],
    )  # fmt: skip


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not abs(value) < float("inf") else value
