"""The record of one answered sample: what is kept of it for ever."""

import hashlib
from itertools import chain

import numpy as np

import kvx
from kvx.eval.answering import Answered, Batch
from kvx.eval.kept import evidence_kept
from kvx.eval.records import Cell, Record
from kvx.eval.tasks.registry import Task


def recorded(
    task: Task,
    cell: Cell,
    index: int,
    policy: kvx.Policy,
    batch: Batch,
    row: int,
    answered: Answered,
    *,
    bf16_bytes: int,
    seconds: dict[str, float],
    compiled: bool,
) -> Record:
    """One row of an answered batch.

    Args:
        index: of the sample in its cell.
        row: of the sample in its batch.
        bf16_bytes: of one row's full cache in bfloat16.
        seconds: of the batch, by what was done.
        compiled: whether they hold compilation.
    """
    sample, rows = batch.samples[row], len(batch.samples)
    scores = [
        task.score(text, question) if sure is None else float(np.exp(sure))
        for text, question, sure in zip(answered.texts[row], sample.questions, answered.likelihoods[row], strict=True)
    ]
    ids = [*batch.contexts[row], *chain.from_iterable(batch.questions[row])]
    return Record(
        cell=cell,
        policy=policy.text,
        index=index,
        sha256=hashlib.sha256(np.asarray(ids, np.int32).tobytes()).hexdigest(),
        tokens=len(batch.contexts[row]) + max(map(len, batch.questions[row])),
        depth=sample.depth,
        answers=tuple(answered.texts[row]),
        expected=tuple(question.answers for question in sample.questions),
        scores=tuple(scores),
        cache_bytes=answered.cache.nbytes // rows,
        bf16_bytes=bf16_bytes,
        bytes_read=answered.cache.bytes_read() // rows,
        policy_bytes=policy.nbytes,
        retention=evidence_kept(answered.cache, row, batch.places[row]),
        seconds=seconds,
        compiled=compiled,
    )
