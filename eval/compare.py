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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

import kvx
from kvx.cache import KVCache
from kvx.decoder import Decoder
from kvx.errors import BadInput
from kvx.eval.passkey import ANSWER, Passkey, passkeys, spread
from kvx.eval.perplexity import WORKERS, as_bfloat16, perplexities
from kvx.eval.results import PolicyResult, Results
from kvx.eval.shared_pass import prefill_each
from kvx.eval.stopwatch import Stopwatch
from kvx.models.token_kinds import token_kinds
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


@dataclass(frozen=True)
class Workload:
    """What is run.

    Attributes:
        passkey: prompt lengths in tokens, and how many prompts of each.
        documents: held-out documents, one batch.
        prompt: tokens of each that are prefilled.
        forced: tokens of each that go through the decode path.
        calibration: texts and their length in tokens, for policies that learn.
        timed_length: the passkey length at which decoding is timed; it needs two passes, and each prompt makes two.
        prefill_length: the passkey length at which each policy's prefill is timed alone.
    """

    passkey: tuple[tuple[int, int], ...] = ((1024, 3), (2048, 2), (4096, 1))
    documents: int = 4
    prompt: int = 512
    forced: int = 128
    calibration: tuple[int, int] = (4, 1024)
    timed_length: int = 2048
    prefill_length: int = 1024

    @classmethod
    def long(cls) -> "Workload":
        """More prompts and depths, longer documents: an hour or more on two cores."""
        return cls(passkey=((1024, 10), (2048, 10), (4096, 10)), documents=8, prompt=1024, forced=256)

    @property
    def longest(self) -> int:
        """The longest prompt, at which bytes are reported."""
        return max(length for length, _ in self.passkey)


def default_policies() -> list[kvx.Policy]:
    """Ten kinds of method beside the full cache, at 256 slots per KV head where there is a budget.

    As many as two cores compile and run in eight minutes: most of the time goes into compilation, and a cache that
    grows (a second tier, a pool) compiles anew for every prompt length.
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
    with Steps(job.steps, console) as steps:
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
        self.rates: dict[str, list[float]] = {policy.text: [] for policy in policies}
        self.warm = False
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
        timed = next(prompt for length, prompt in prompts if length == self.workload.prefill_length)
        self._prefill_times(decoder, timed, step)
        for text, row in self.rows.items():
            self._summarise(row, self.rates[text])

    def _calibrate(self, decoder: Decoder, tokenizer: Any) -> None:
        if any(policy.by_kind for policy in self.policies):
            kinds = token_kinds(tokenizer)
            self.policies = [policy.with_kinds(kinds) for policy in self.policies]
            for policy in self.policies:
                self.rows[policy.text].policy_bytes = policy.nbytes
        if not any(stage.learns for policy in self.policies for stage in policy.stages):
            return
        batch = documents(tokenizer, self.prose.haystack, *self.workload.calibration)
        # One text at a time: calibration is no faster in a batch, and its peak is a quarter.
        texts = [batch[row : row + 1] for row in range(len(batch))]
        # Results stay under the text that was asked for, whatever hyperparameters calibration adds to it.
        self.policies = [
            replace(kvx.calibrate(policy, decoder, texts, seed=self.seed), text=policy.text) for policy in self.policies
        ]
        for policy in self.policies:
            self.rows[policy.text].policy_bytes = policy.nbytes

    def _perplexity(self, decoder: Decoder, held_out: np.ndarray, step: Callable[[str], None]) -> None:
        found = perplexities(decoder, held_out, self.workload.prompt, self.policies)
        full = 0
        for policy in self.policies:
            step(f"perplexity: {policy.text}")
            with self.watch.phase("perplexity"):
                value, nbytes, halved = next(found)
            row = self.rows[policy.text]
            full = full or halved  # the full cache comes first
            row.perplexity, row.perplexity_share_of_bf16 = value, nbytes / full

    def _passkey(
        self, decoder: Decoder, tokenizer: Any, prompt: Passkey, length: int, aware: bool, step: Callable[[str], None]
    ) -> None:
        """One prompt under one protocol for every policy."""
        given = prompt.question[-1:] if aware else prompt.question
        ids = np.asarray([prompt.tokens[: length - len(given)]])
        step("prefill")
        with self.watch.phase("passkey: prefill"):
            room = len(prompt.question) + ANSWER
            caches = [cache for _, cache in prefill_each(decoder, ids, self.policies, room)]
            jax.block_until_ready(caches)
        if length == self.workload.longest and not aware:
            for policy, cache in zip(self.policies, caches, strict=True):
                self._bytes(self.rows[policy.text], cache, caches[0], ids.shape[1])
        stop = [*tokenizer.eos_ids, *_ends(tokenizer)]

        def answer(policy: kvx.Policy, cache: KVCache) -> tuple[list[int], float]:
            begin = time.perf_counter()
            result = kvx.generate(
                decoder, np.asarray([given]), policy=policy, cache=cache, max_new_tokens=ANSWER, stop=stop
            )
            new = [token for token in np.asarray(result.tokens)[0].tolist() if token >= 0]
            return new, time.perf_counter() - begin

        # The first prompt of the timed length compiles for all that follow of it.
        timed = length == self.workload.timed_length and self.warm
        self.warm = self.warm or length == self.workload.timed_length
        phase = "passkey: decode, timed" if timed else "passkey: decode, two at a time, with compilation"
        with self.watch.phase(phase), ThreadPoolExecutor(1 if timed else WORKERS) as pool:
            answers = pool.map(answer, self.policies, caches)
            del caches
            for policy, (new, seconds) in zip(self.policies, answers, strict=True):
                step(policy.text)
                text = tokenizer.decode(new)
                self.rows[policy.text].answers.append(
                    {"length": length, "depth": round(prompt.depth, 3), "aware": aware, "key": prompt.key,
                     "answer": text, "correct": prompt.correct(text)}
                )  # fmt: skip
                if timed:
                    self.rates[policy.text].append((len(given) + len(new) - 1) / seconds)

    def _bytes(self, row: PolicyResult, cache: KVCache, full: KVCache, tokens: int) -> None:
        row.cache_bytes, row.bytes_read = cache.nbytes, cache.bytes_read()
        row.bytes_per_token = cache.nbytes / tokens
        row.share_of_full, row.share_of_bf16 = cache.nbytes / full.nbytes, cache.nbytes / as_bfloat16(full)

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

    def _summarise(self, row: PolicyResult, rates: list[float]) -> None:
        for aware in (False, True):
            correct = [answer["correct"] for answer in row.answers if answer["aware"] == aware]
            setattr(row, "aware" if aware else "agnostic", sum(correct) / len(correct))
        row.tokens_per_second = statistics.median(rates)


def _ends(tokenizer: Any) -> list[int]:
    """Tokens that end an answer early: a key is a number, nothing after its full stop is read."""
    found = [tokenizer.encode(mark, add_special=False) for mark in (".", "\n")]
    return [ids[0] for ids in found if len(ids) == 1]
