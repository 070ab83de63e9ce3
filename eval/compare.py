"""The main job: many cache policies over passkey retrieval and perplexity, with their bytes and speed.

The exact prefill does not depend on a policy that acts after it, so one pass over a prompt serves all of them. Passkey
prompts run one by one: a cache with a budget in slots then has one shape, hence one compiled decode program, at every
prompt length, and its speed is that of batch 1.
"""

import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import kvx
from kvx.cache import KVCache
from kvx.decoder import Decoder
from kvx.errors import BadInput
from kvx.eval.passkey import ANSWER, Passkey, passkeys, spread
from kvx.eval.perplexity import perplexities
from kvx.eval.prose import Prose, documents
from kvx.eval.results import PolicyResult, Results
from kvx.eval.stopwatch import Stopwatch

DEFAULTS = (
    "full",
    "streaming_llm(budget=256)",
    "h2o(budget=256)",
    "snapkv(budget=256)",
    "tova(budget=256)",
    "knorm(budget=256)",
    "pyramidkv(budget=256)",
    "adakv(budget=256)",
    "q_filters(budget=256)",
    "d2o(budget=256)",
    "kivi(bits=4)",
    "kivi(bits=2)",
    "mikv(high=256)",
    "quest(budget=256)",
    "snapkv(budget=256)+kivi(bits=4)",
)


@dataclass(frozen=True)
class Workload:
    """What is run.

    Attributes:
        passkey: prompt lengths in tokens, and how many prompts of each.
        documents: held-out documents, one batch.
        prompt: tokens of each that are prefilled.
        forced: tokens of each that go through the decode path.
        calibration: texts and their length in tokens, for policies that learn.
        timed_length: the passkey length at which speed is reported.
    """

    passkey: tuple[tuple[int, int], ...] = ((1024, 3), (2048, 2), (4096, 1))
    documents: int = 4
    prompt: int = 512
    forced: int = 128
    calibration: tuple[int, int] = (4, 1024)
    timed_length: int = 2048

    @classmethod
    def long(cls) -> "Workload":
        """More prompts and depths, longer documents: an hour or more on two cores."""
        return cls(passkey=((1024, 10), (2048, 10), (4096, 10)), documents=8, prompt=1024, forced=256)

    @property
    def longest(self) -> int:
        """The longest prompt, at which bytes are reported."""
        return max(length for length, _ in self.passkey)


def default_policies() -> list[kvx.Policy]:
    """Every kind of method, at 256 slots per KV head where there is a budget."""
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
    model: str | tuple[Decoder, Any],
    policies: Sequence[kvx.Policy],
    prose: Prose,
    workload: Workload = Workload(),
    *,
    seed: int = 0,
    console: Console | None = None,
) -> Results:
    """Run every policy over both workloads.

    Args:
        model: what `kvx.load` takes, or a model and its tokenizer.
        policies: the full cache is put first if it is not there; those that learn are calibrated.
        prose: haystacks, calibration texts (first half) and held-out documents (second half).
        workload: what is run.
        seed: of keys, places and calibration.
        console: where the progress bar goes; None: standard error.

    Raises:
        BadInput: a policy, text or model that does not fit; twice the same policy.
    """
    begin = time.perf_counter()
    texts = [policy.text for policy in policies]
    if twice := {text for text in texts if texts.count(text) > 1}:
        raise BadInput(f"policy {min(twice)!r} is given twice; allowed: once")
    chosen = [*([] if "full" in texts else [kvx.policies.full()]), *policies]
    chosen.sort(key=lambda policy: policy.text != "full")
    job = _Job(workload, seed, chosen, prose)
    with _Steps(job.steps, console) as steps:
        job.run(model, steps)
    name = model if isinstance(model, str) else type(model[0]).__name__
    return Results(
        model=name,
        workload={**asdict(workload), "longest": workload.longest},
        text={"name": prose.name, "sha256": prose.sha256},
        seed=seed,
        command=shlex.join(["kvx", *sys.argv[1:]]),
        device={"platform": jax.default_backend(), "kind": jax.devices()[0].device_kind, "cores": os.cpu_count()},
        policies=list(job.rows.values()),
        phases=job.watch.phases,
        seconds=time.perf_counter() - begin,
    )


class _Job:
    """One run; results collect in `rows` by policy text."""

    def __init__(self, workload: Workload, seed: int, policies: list[kvx.Policy], prose: Prose):
        self.workload, self.seed, self.policies, self.prose = workload, seed, policies, prose
        self.rows = {policy.text: PolicyResult(policy.text, policy.bounded) for policy in policies}
        self.rates: dict[str, list[tuple[bool, float]]] = {policy.text: [] for policy in policies}
        self.watch = Stopwatch()
        prompts = sum(count for _, count in workload.passkey)
        self.steps = 3 + (2 * prompts + 2) * len(policies) + 2 * prompts

    def run(self, model: str | tuple[Decoder, Any], step: Callable[[str], None]) -> None:
        """Everything, in order; `step` is told what begins."""
        step("load the model")
        with self.watch.phase("load"):
            decoder, tokenizer = kvx.load(model) if isinstance(model, str) else model
        step("make the prompts")
        with self.watch.phase("prompts"):
            prompts = [
                (length, prompt)
                for length, count in self.workload.passkey
                for prompt in passkeys(tokenizer, self.prose, length, spread(count), self.seed)
            ]
            held_out = documents(
                tokenizer, self.prose.held_out, self.workload.documents, self.workload.prompt + self.workload.forced
            )
        step("calibrate")
        with self.watch.phase("calibrate"):
            self._calibrate(decoder, tokenizer)
        self._perplexity(decoder, held_out, step)
        for number, (length, prompt) in enumerate(prompts):
            for aware in (False, True):
                order = "before" if aware else "after"
                label = f"passkey {number + 1}/{len(prompts)}, {length} tokens, question {order} compression"
                self._passkey(decoder, tokenizer, prompt, length, aware, lambda name, at=label: step(f"{at}: {name}"))
        timed = next(prompt for length, prompt in prompts if length == self.workload.timed_length)
        self._prefill_times(decoder, timed, step)
        for text, row in self.rows.items():
            self._summarise(row, self.rates[text])

    def _calibrate(self, decoder: Decoder, tokenizer: Any) -> None:
        if not any(stage.learns for policy in self.policies for stage in policy.stages):
            return
        batch = documents(tokenizer, self.prose.haystack, *self.workload.calibration)
        # One text at a time: calibration is no faster in a batch, and its peak is a quarter.
        texts = [batch[row : row + 1] for row in range(len(batch))]
        self.policies = [kvx.calibrate(policy, decoder, texts, seed=self.seed) for policy in self.policies]
        for policy in self.policies:
            self.rows[policy.text].policy_bytes = policy.nbytes

    def _perplexity(self, decoder: Decoder, held_out: np.ndarray, step: Callable[[str], None]) -> None:
        found = perplexities(decoder, held_out, self.workload.prompt, self.policies)
        reference = 0
        for policy in self.policies:
            step(f"perplexity: {policy.text}")
            with self.watch.phase("perplexity"):
                value, cache = next(found)
            row = self.rows[policy.text]
            reference = reference or as_bfloat16(cache)
            row.perplexity, row.perplexity_share_of_bf16 = value, cache.nbytes / reference

    def _passkey(
        self, decoder: Decoder, tokenizer: Any, prompt: Passkey, length: int, aware: bool, step: Callable[[str], None]
    ) -> None:
        """One prompt under one protocol for every policy."""
        given = prompt.question[-1:] if aware else prompt.question
        ids = np.asarray([prompt.tokens[: length - len(given)]])
        step("prefill")
        with self.watch.phase("passkey: prefill"):
            room = len(prompt.question) + ANSWER
            _, caches = kvx.prefill(decoder, ids, tuple(self.policies), max_new_tokens=room)
            waiting = list(jax.block_until_ready(caches))
        del caches
        full = waiting[0].nbytes, as_bfloat16(waiting[0])
        for policy in self.policies:
            cache = waiting.pop(0)
            row = self.rows[policy.text]
            step(policy.text)
            if length == self.workload.longest and not aware:
                row.cache_bytes, row.bytes_read = cache.nbytes, cache.bytes_read()
                row.bytes_per_token = cache.nbytes / ids.shape[1]
                row.share_of_full, row.share_of_bf16 = (cache.nbytes / whole for whole in full)
            with self.watch.phase("passkey: decode") as lap:
                result = kvx.generate(
                    decoder,
                    np.asarray([given]),
                    policy=policy,
                    cache=cache,
                    max_new_tokens=ANSWER,
                    stop=tokenizer.eos_ids,
                )
                new = [token for token in np.asarray(result.tokens)[0].tolist() if token >= 0]
            answer = tokenizer.decode(new)
            row.answers.append(
                {"length": length, "depth": round(prompt.depth, 3), "aware": aware, "key": prompt.key,
                 "answer": answer, "correct": prompt.correct(answer)}
            )  # fmt: skip
            if length == self.workload.timed_length:
                self.rates[policy.text].append((lap.warm, (len(given) + len(new) - 1) / lap.wall))

    def _prefill_times(self, decoder: Decoder, prompt: Passkey, step: Callable[[str], None]) -> None:
        """Each policy alone: the exact pass with the evidence it reads, and its packing."""
        ids = np.asarray([prompt.context])
        room = len(prompt.question) + ANSWER
        for policy in self.policies:
            step(f"time prefill: {policy.text}")
            for _ in range(2):
                with self.watch.phase("prefill times") as lap:
                    jax.block_until_ready(kvx.prefill(decoder, ids, policy, max_new_tokens=room))
                self.rows[policy.text].prefill_seconds = lap.wall
                if lap.warm:
                    break

    def _summarise(self, row: PolicyResult, rates: list[tuple[bool, float]]) -> None:
        for aware in (False, True):
            correct = [answer["correct"] for answer in row.answers if answer["aware"] == aware]
            setattr(row, "aware" if aware else "agnostic", sum(correct) / len(correct))
        warm = [rate for is_warm, rate in rates if is_warm] or [rate for _, rate in rates]
        row.tokens_per_second = statistics.median(warm)


def as_bfloat16(cache: KVCache) -> int:
    """Bytes that a cache would take with its floating-point arrays in bfloat16."""
    return sum(
        leaf.size * 2 if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.nbytes for leaf in jax.tree.leaves(cache)
    )


class _Steps:
    """A progress bar that names the current step; lines where there is no terminal, one for each stage of the job."""

    def __init__(self, total: int, console: Console | None):
        self.console = console or Console(stderr=True)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task("start", total=total)
        self.begin, self.done, self.stage = time.perf_counter(), 0, ""

    def __enter__(self) -> "_Steps":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def __call__(self, label: str) -> None:
        """A step begins, hence the one before is done."""
        self.bar.update(self.task, description=label, completed=self.done)
        self.done += 1
        stage = label.rpartition(":")[0] or label
        if stage != self.stage and not self.console.is_terminal:
            seconds = time.perf_counter() - self.begin
            self.console.print(f"{seconds:6.1f} s  {stage}", highlight=False, soft_wrap=True)
        self.stage = stage
