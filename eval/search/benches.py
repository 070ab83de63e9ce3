"""What runs policies for a search: a task's samples, or documents; both yield the records of `kvx eval`."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console

from kvx.decoder import Decoder
from kvx.errors import BadInput
from kvx.eval.answering import answer, batches
from kvx.eval.cost.cache_bytes import as_bfloat16
from kvx.eval.fidelity import fidelity
from kvx.eval.fidelity.samples import fidelity_record, seeded_documents
from kvx.eval.job import FULL
from kvx.eval.loading import rows_together
from kvx.eval.programs import make_room
from kvx.eval.prompts import Frame
from kvx.eval.recording import recorded
from kvx.eval.records import Cell, Record
from kvx.eval.search.candidates import Candidates
from kvx.eval.search.job import SearchJob
from kvx.eval.search.loop import Bench
from kvx.eval.search.sizing import Prompts
from kvx.eval.stopwatch import Stopwatch
from kvx.eval.summary import FIDELITY
from kvx.eval.tasks.registry import find
from kvx.eval.tasks.sample import Mode
from kvx.eval.tasks.source import Source
from kvx.prose import Prose


def bench_of(job: SearchJob, decoder: Decoder, tokenizer: Any, prose: Prose, records: Sequence[Record] = ()) -> Bench:
    """The bench of a job.

    Args:
        records: of an earlier run.

    Raises:
        BadInput: samples that cannot be made.
    """
    candidates = Candidates(decoder, tokenizer, prose, job.calibration, job.seed)
    return DocumentBench(job, candidates) if job.on_documents else TaskBench(job, candidates, records)


class TaskBench:
    """A task's samples, in batches of one shape; the first few have their evidence all over the text (`spread`)."""

    floor = 0.0

    def __init__(self, job: SearchJob, candidates: Candidates, records: Sequence[Record]):
        (section,) = job.evaluation().tasks
        tokenizer, prose = candidates.tokenizer, candidates.prose
        self.task, self.length, self.candidates = find(section.name), job.length, candidates
        self.mode: Mode = job.mode
        frame = Frame.of(tokenizer, job.chat)
        self.cell = Cell(job.model, section.text, job.length, job.mode)
        source = Source(tokenizer, prose, frame)
        made = self.task.make(source, job.length, section.samples, job.seed, **section.options)
        self.samples = len(made)
        self.batch = rows_together(candidates.decoder, min(job.batch, len(made)))
        self.batches = batches(tokenizer, frame, made, self.batch, job.mode)
        self.bf16_bytes = records[0].bf16_bytes if records else 0

    def sizes(self, texts: Sequence[str]) -> Mapping[str, float | BadInput]:
        """By the first batch; see `Bench`."""
        first = self.batches[0]
        tokens, lengths = np.zeros((self.batch, first.width), np.int32), np.zeros(self.batch, np.int32)
        for row, (context, asked) in enumerate(zip(first.contexts, first.questions, strict=True)):
            ids = context + (asked[0][:-1] if self.mode != "agnostic" else [])
            tokens[row, : len(ids)], lengths[row] = ids, len(ids)
        found = self.candidates.sizes(texts, Prompts(tokens, lengths, first.room))
        return {text: size if isinstance(size, BadInput) else size / self.length for text, size in found.items()}

    def run(self, texts: Sequence[str], samples: Sequence[int]) -> Iterator[list[Record]]:
        """A policy on a batch at a time."""
        tokenizer = self.candidates.tokenizer
        policies = [self.candidates.policy(text) for text in texts]
        for at, batch in enumerate(self.batches):
            indices = range(self.samples)[at * self.batch : (at + 1) * self.batch]
            rows = [row for row, index in enumerate(indices) if index in samples]
            if not rows:
                continue
            make_room()
            watch = Stopwatch()
            for policy, answered in answer(
                self.candidates.decoder, tokenizer, batch, self.mode, policies,
                by_layer=True, watch=watch,
            ):  # fmt: skip
                if policy.text == FULL:
                    self.bf16_bytes = as_bfloat16(answered.cache) // self.batch
                prefill, decode = watch.phases["prefill"], answered.decode
                yield [
                    recorded(
                        self.task, self.cell, indices[row], policy, batch, row, answered,
                        bf16_bytes=self.bf16_bytes,
                        seconds={"prefill": prefill["wall"], "decode": decode, "step": decode / answered.steps},
                        compiled=answered.compiled or prefill["compile"] > 0,
                    )
                    for row in rows
                ]  # fmt: skip

    def quality(self, record: Record) -> float:
        """The score."""
        return record.score

    def nbytes(self, record: Record) -> float:
        """Bytes a token of the task's length."""
        return record.cache_bytes / self.length


class DocumentBench:
    """Held-out documents, along which policies are compared with the full cache; the less they diverge, the better."""

    floor = -math.inf

    def __init__(self, job: SearchJob, candidates: Candidates):
        self.candidates, self.prompt, self.forced = candidates, job.length, job.forced
        self.length, self.samples = job.length + job.forced, job.samples
        self.cell = Cell(job.model, FIDELITY, self.length, "agnostic")
        self.batch = rows_together(candidates.decoder, min(job.batch, job.samples))
        self.texts = seeded_documents(candidates.tokenizer, candidates.prose, job.samples, self.length, job.seed)

    def sizes(self, texts: Sequence[str]) -> Mapping[str, float | BadInput]:
        """By the first documents; see `Bench`."""
        tokens = np.resize(self.texts, (self.batch, self.length))[:, : self.prompt]
        lengths = np.full(self.batch, self.prompt, np.int32)
        found = self.candidates.sizes(texts, Prompts(tokens, lengths, self.forced))
        return {text: size if isinstance(size, BadInput) else size / self.length for text, size in found.items()}

    def run(self, texts: Sequence[str], samples: Sequence[int]) -> Iterator[list[Record]]:
        """All policies along some documents at a time."""
        policies = [self.candidates.policy(text) for text in texts]
        for start in range(0, len(samples), self.batch):
            make_room()
            chosen = list(samples[start : start + self.batch])
            # Filled up by repetition, so that all batches have one shape.
            rows = np.resize(chosen, self.batch)
            found = fidelity(
                self.candidates.decoder, self.texts[rows], self.prompt, policies,
                by_layer=True, console=Console(quiet=True),
            )  # fmt: skip
            for each in found:
                yield [
                    fidelity_record(self.cell, index, self.texts[index], each, row) for row, index in enumerate(chosen)
                ]

    def quality(self, record: Record) -> float:
        """Less divergence is more quality."""
        return -record.score

    def nbytes(self, record: Record) -> float:
        """Bytes a token of a document."""
        return record.cache_bytes / self.length
