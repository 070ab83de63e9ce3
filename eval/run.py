"""Running an evaluation: every policy on every sample, each record on the disk as soon as it is known, resumable."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

import kvx
from kvx.cache import KVCache
from kvx.decoder import Decoder
from kvx.eval.answering import Batch, answer, batches
from kvx.eval.cost.cache_bytes import as_bfloat16
from kvx.eval.job import FULL, EvalJob, TaskSection
from kvx.eval.kept import kept
from kvx.eval.loading import Loaded, load_over_devices, rows_together
from kvx.eval.programs import make_room
from kvx.eval.prompts import Frame
from kvx.eval.readying import ready
from kvx.eval.recording import recorded
from kvx.eval.records import COSTS, KEPT, RECORDS, Cell, Kept, Record, append, mend, read
from kvx.eval.results_folder import claim, write_summary
from kvx.eval.stopwatch import Stopwatch
from kvx.eval.summary import FIDELITY
from kvx.eval.tasks.registry import Task, find
from kvx.eval.tasks.sample import Sample
from kvx.eval.tasks.source import Source
from kvx.models.zoo import resolve
from kvx.progress import Steps
from kvx.prose import Prose, prose


def run(
    job: EvalJob,
    *,
    console: Console | None = None,
    loaded: dict[str, Loaded] | None = None,
    policies: Sequence[kvx.Policy] | None = None,
    text: Prose | None = None,
    anew: bool = False,
) -> Path:
    """Run what of a job is not done yet, and write its summary and report.

    Args:
        job: what to run.
        console: where the progress bar goes; None: standard error.
        loaded: models by the name that the job gives them; the others are loaded.
        policies: those of the job where they are at hand, the full cache first.
        text: the job's, where it is at hand.
        anew: remove the results of an earlier run, instead of going on with them.

    Returns:
        The results folder: config.json, records.jsonl, kept.jsonl, costs.jsonl, summary.csv, report.html.

    Raises:
        BadInput: a folder that holds the results of another job; samples that cannot be made; a model or a policy that
            does not fit. Nothing was overwritten.
    """
    text = text or prose(None if job.text is None else Path(job.text))
    policies = job.chosen() if policies is None else policies
    folder = Path(job.folder)
    for model in job.models:
        if model not in (loaded or {}):
            resolve(model)  # one that does not exist must not leave a folder behind
    if not anew:
        claim(job, text)  # refused before a model is loaded
        for name in (RECORDS, KEPT, COSTS):
            mend(folder / name)
    for index, model in enumerate(job.models):
        decoder, tokenizer = (loaded or {}).get(model) or load_over_devices(model, job.dtype)
        study = _Study(job, model, decoder, tokenizer, text, list(policies), folder, console)
        units = study.prepare()
        if anew and index == 0:
            claim(job, text, anew)  # what is there is given up once the new job is known to run
        study.run(units)
    write_summary(folder)
    return folder


@dataclass(frozen=True)
class _Unit:
    """A batch of one cell: what is done at a time."""

    task: Task
    cell: Cell
    batch: Batch
    first: int
    count: int

    @property
    def indices(self) -> range:
        """Samples in it; the batch's further rows are padding."""
        return range(self.first, self.first + self.count)


@dataclass
class _Study:
    """One model's part of a job."""

    job: EvalJob
    model: str
    decoder: Decoder
    tokenizer: Any
    prose: Prose
    policies: list[kvx.Policy]
    folder: Path
    console: Console | None

    def prepare(self) -> list[_Unit]:
        """Everything that can be refused: policies that the model cannot serve, and samples that cannot be made."""
        self.frame = Frame.of(self.tokenizer, self.job.chat)
        for policy in self.policies:
            policy.check([block.spec for block in self.decoder.blocks])
        return list(self._units())

    def run(self, units: list[_Unit]) -> None:
        """What of it is not done yet."""
        records = [each for each in read(self.folder / RECORDS, Record) if each.cell.model == self.model]
        done = {(record.cell, record.policy, record.index) for record in records}
        self.bf16 = {record.cell: record.bf16_bytes for record in records}
        self.mapped = {(each.cell, each.policy) for each in read(self.folder / KEPT, Kept)}
        todo = [(unit, [each.text for each in self.policies if self._lacks(unit, each, done)]) for unit in units]
        with Steps(sum(len(missing) + 1 for _, missing in todo if missing) + 1, self.console) as step:
            step(f"{self.model}: calibrate")
            if any(missing for _, missing in todo) or self.job.fidelity.documents or self.job.cost.lengths:
                self.policies = ready(
                    self.policies, self.decoder, self.tokenizer, self.prose, self.job.calibration, self.job.seed
                )
            warm: set[Cell] = set()
            for unit, missing in todo:
                for group in self._groups(missing):
                    make_room()
                    self._answer(unit, group, unit.cell in warm, step)
                warm |= {unit.cell} if missing else set()
        self._fidelity(done)
        self._cost()

    def _units(self) -> Iterator[_Unit]:
        """In the order of the job: all batches of a cell one after the other."""
        source = Source(self.tokenizer, self.prose, self.frame)
        for section in self.job.tasks:
            size = rows_together(self.decoder, min(self.job.batch, section.samples))
            for length in section.lengths:
                samples = self._samples(source, section, length)
                for mode in section.modes:
                    cell = Cell(self.model, section.text, length, mode)
                    for index, batch in enumerate(batches(self.tokenizer, source.frame, samples, size, mode)):
                        first = index * size
                        yield _Unit(find(section.name), cell, batch, first, min(size, len(samples) - first))

    def _samples(self, source: Source, section: TaskSection, length: int) -> Sequence[Sample]:
        return find(section.name).make(source, length, section.samples, self.job.seed, **section.options)

    def _lacks(self, unit: _Unit, policy: kvx.Policy, done: set[tuple[Cell, str, int]]) -> bool:
        return any((unit.cell, policy.text, index) not in done for index in unit.indices)

    def _groups(self, texts: list[str]) -> Iterator[list[kvx.Policy]]:
        """Those of the policies that share a pass."""
        chosen = [policy for policy in self.policies if policy.text in texts]
        size = self.job.together or max(len(chosen), 1)
        for start in range(0, len(chosen), size):
            yield chosen[start : start + size]

    def _answer(self, unit: _Unit, policies: list[kvx.Policy], warm: bool, step: Steps) -> None:
        """One batch under some policies; the first batch of a cell compiles, two policies at a time."""
        cell, watch = unit.cell, Stopwatch()
        label = f"{cell.task}, {cell.length} tokens, {cell.mode}, samples {unit.first + 1} to {unit.first + unit.count}"
        found = answer(
            self.decoder, self.tokenizer, unit.batch, cell.mode, policies,
            timed=warm, by_layer=self.job.by_layer, watch=watch, tell=lambda what: step(f"{label}: {what}"),
        )  # fmt: skip
        for policy, answered in found:
            step(f"{label}: {policy.text}")
            if policy.text == FULL:
                self.bf16[cell] = as_bfloat16(answered.cache) // len(unit.batch.samples)
            prefill = watch.phases["prefill"]
            seconds = {"prefill": prefill["wall"], "decode": answered.decode, "step": answered.decode / answered.steps}
            compiled = answered.compiled or prefill["compile"] > 0
            new = [
                recorded(
                    unit.task, cell, unit.first + row, policy, unit.batch, row, answered,
                    bf16_bytes=self.bf16[cell], seconds=seconds, compiled=compiled,
                )
                for row in range(unit.count)
            ]  # fmt: skip
            append(self.folder / RECORDS, new)
            if self._is_mapped(unit) and (cell, policy.text) not in self.mapped:
                append(self.folder / KEPT, [self._kept(unit, policy, answered.cache)])

    def _is_mapped(self, unit: _Unit) -> bool:
        """A map is drawn of the first sample of a task at its shortest length."""
        shortest = {section.text: min(section.lengths) for section in self.job.tasks}
        return unit.first == 0 and unit.cell.length == shortest[unit.cell.task]

    def _kept(self, unit: _Unit, policy: kvx.Policy, cache: KVCache) -> Kept:
        ids = unit.batch.contexts[0] + (unit.batch.questions[0][0][:-1] if unit.cell.mode != "agnostic" else [])
        mask = kept(cache, 0, len(ids))
        return Kept(
            unit.cell, policy.text, tuple(self.tokenizer.decode([each]) for each in ids),
            tuple(map(tuple, mask.sum(axis=2).tolist())), Kept.packed(mask), mask.shape,
        )  # fmt: skip

    def _fidelity(self, done: set[tuple[Cell, str, int]]) -> None:
        from kvx.eval.fidelity import fidelity_records

        section = self.job.fidelity
        if not section.documents:
            return
        make_room()
        known = {policy for cell, policy, index in done if cell.task == FIDELITY and index == section.documents - 1}
        todo = [policy for policy in self.policies if policy.text not in known]
        for record in fidelity_records(
            self.model, self.decoder, self.tokenizer, self.prose, todo,
            documents=section.documents, prompt=section.prompt, forced=section.forced, most=section.most,
            seed=self.job.seed, by_layer=self.job.by_layer, console=self.console,
        ):  # fmt: skip
            if (record.cell, record.policy, record.index) not in done:
                append(self.folder / RECORDS, [record])

    def _cost(self) -> None:
        from kvx.eval.cost import costs
        from kvx.eval.records import Cost

        section = self.job.cost
        if not section.lengths:
            return
        there = read(self.folder / COSTS, Cost)
        known = {(each.policy, each.length, each.batch) for each in there if each.model == self.model}
        text = np.asarray(self.tokenizer.encode("\n\n".join(self.prose.held_out)), np.int32)
        for length in section.lengths:
            for batch in section.batches:
                todo = [policy for policy in self.policies if (policy.text, length, batch) not in known]
                for cost in costs(self.decoder, self.model, todo, [length], [batch], tokens=text, steps=section.steps):
                    append(self.folder / COSTS, [cost])
