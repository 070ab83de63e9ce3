"""The main job, a preset of `kvx.eval.run`: many policies over passkey retrieval and held-out prose, with their speed.

Answers and forced text are decoded layer by layer, since they are short and every policy would compile a decode step
for each of its cache's shapes. Speed is measured apart, one row at a time, layer by layer too.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

import kvx
from kvx.errors import BadInput
from kvx.eval.comparison import PolicyResult, Results, policy_results
from kvx.eval.cost import lap
from kvx.eval.job import FULL, EvalJob, FidelitySection, TaskSection
from kvx.eval.loading import Loaded
from kvx.eval.programs import make_room
from kvx.eval.provenance import provenance
from kvx.eval.readying import ready
from kvx.eval.records import RECORDS, Record, read
from kvx.eval.run import run
from kvx.eval.stopwatch import Stopwatch
from kvx.progress import Steps
from kvx.prose import Prose, documents

DEFAULTS = (
    "full",
    "streaming_llm(budget=256)",
    "h2o(budget=256)",
    "snapkv(budget=256)",
    "tova(budget=256)",
    "knorm(budget=256)",
    "adakv(budget=256)",
    "q_filters(budget=256)",
    "kivi(bits=4)",
    "quest(budget=256)",
    "snapkv(budget=256)+kivi(bits=4)",
)
STEPS = 16
"""Decode steps that are timed together."""


@dataclass(frozen=True)
class Workload:
    """What is run.

    Attributes:
        passkey: prompt lengths in tokens, and how many prompts of each.
        documents: held-out documents, one batch.
        prompt: tokens of each that are prefilled.
        forced: tokens of each that go through the decode path.
        calibration: texts and their length in tokens, for policies that learn.
        timed_length: tokens of the prompt with which each policy's prefill and decoding are timed alone.
    """

    passkey: tuple[tuple[int, int], ...] = ((1024, 3), (2048, 2), (4096, 1))
    documents: int = 4
    prompt: int = 512
    forced: int = 128
    calibration: tuple[int, int] = (4, 1024)
    timed_length: int = 512

    @classmethod
    def long(cls) -> "Workload":
        """More prompts and depths, longer documents: an hour or more on two cores."""
        return cls(passkey=((1024, 10), (2048, 10), (4096, 10)), documents=8, prompt=1024, forced=256)

    @property
    def longest(self) -> int:
        """The longest prompt, at which bytes are reported."""
        return max(length for length, _ in self.passkey)

    def job(self, model: str, policies: Sequence[str], seed: int, out: Path) -> EvalJob:
        """The same as an evaluation's job."""
        return EvalJob(
            "compare",
            models=(model,),
            policies=tuple(policies),
            tasks=tuple(TaskSection("passkey", (length,), count) for length, count in self.passkey),
            fidelity=FidelitySection(self.documents, self.prompt, self.forced, most=0),
            seed=seed,
            batch=min(4, max(count for _, count in self.passkey)),
            calibration=self.calibration,
            output=str(out),
        )


def default_policies() -> list[kvx.Policy]:
    """Ten kinds of method beside the full cache, at 256 slots per KV head where there is a budget.

    No more of them, since each runs every prompt and document: the demo is to be done while one waits.
    """
    return [kvx.parse_policy(text) for text in DEFAULTS]


def checked_out(folder: Path) -> Path:
    """The folder for results, refused before any work if it cannot be one.

    Raises:
        BadInput: a file, or below a file or a folder that cannot be written.
    """
    nearest = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise BadInput(f"out={str(folder)!r} cannot be written; allowed: a folder, which is made if need be")
    return folder


def compare_policies(
    model: str | Loaded,
    policies: Sequence[kvx.Policy],
    prose: Prose,
    workload: Workload = Workload(),
    *,
    seed: int = 0,
    out: Path = Path("results/compare"),
    console: Console | None = None,
) -> Results:
    """Run every policy over both workloads.

    Args:
        model: what `kvx.load` takes, or a model and its tokenizer.
        policies: the full cache is put first if it is not there; those that learn are calibrated.
        prose: haystacks, calibration texts (first half) and held-out documents (second half).
        workload: what is run.
        seed: of keys, places, documents and calibration.
        out: the results folder of the evaluation; what an earlier comparison left there is replaced.
        console: where the progress bar goes; None: standard error.

    Raises:
        BadInput: a policy, text or model that does not fit; twice the same policy.
    """
    begin, watch = time.perf_counter(), Stopwatch()
    texts = [policy.text for policy in policies]
    if twice := {text for text in texts if texts.count(text) > 1}:
        raise BadInput(f"policy {min(twice)!r} is given twice; allowed: once")
    chosen = [*([] if FULL in texts else [kvx.policies.full()]), *policies]
    chosen.sort(key=lambda policy: policy.text != FULL)
    name = model if isinstance(model, str) else type(model[0]).__name__
    with watch.phase("load"):
        decoder, tokenizer = kvx.load(model) if isinstance(model, str) else model
    with watch.phase("calibrate"):
        chosen = ready(chosen, decoder, tokenizer, prose, workload.calibration, seed)
    job = workload.job(name, [policy.text for policy in chosen], seed, checked_out(out))
    with watch.phase("passkeys and documents"):
        loaded = {name: (decoder, tokenizer)}
        folder = run(job, console=console, loaded=loaded, policies=chosen, text=prose, anew=True)
    rows = policy_results(chosen, read(folder / RECORDS, Record), workload.longest)
    prompt = documents(tokenizer, prose.held_out, 1, workload.timed_length)
    with watch.phase("times"), Steps(len(chosen), console) as step, kvx.layer_by_layer():
        for policy, row in zip(chosen, rows, strict=True):
            step(f"time: {policy.text}")
            make_room()
            lap(decoder, prompt, policy, steps=1)  # compiles
            timed = lap(decoder, prompt, policy, STEPS)
            row.prefill_seconds, row.tokens_per_second = timed.prefill_seconds, 1 / timed.step_seconds
    return Results(
        model=name,
        workload={**asdict(workload), "longest": workload.longest},
        text={"name": prose.name, "sha256": prose.sha256},
        seed=seed,
        **provenance(),
        policies=rows,
        phases=watch.phases,
        seconds=time.perf_counter() - begin,
    )


__all__ = ["DEFAULTS", "PolicyResult", "Workload", "checked_out", "compare_policies", "default_policies"]
