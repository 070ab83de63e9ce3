"""Fidelity as records: one for each policy and document, so that a results folder holds it like any task."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int
from rich.console import Console

import kvx
from kvx.decoder import Decoder
from kvx.eval.fidelity.findings import Fidelity
from kvx.eval.fidelity.measure import MOST, fidelity
from kvx.eval.records import Cell, Record
from kvx.prose import Prose
from kvx.prose import documents as documents_of

TASK = "fidelity"

TOGETHER = 12
"""Policies whose caches exist at a time, beside the full one; each such group runs the full cache once more."""


def fidelity_records(
    model_name: str,
    decoder: Decoder,
    tokenizer: Any,
    prose: Prose,
    policies: Sequence[kvx.Policy],
    *,
    documents: int,
    prompt: int,
    forced: int,
    seed: int,
    most: int = MOST,
    by_layer: bool = False,
    console: Console | None = None,
) -> Iterator[Record]:
    """The records of a task named "fidelity", whose score is the divergence: less is better, 0 is the full cache.

    A record's score is the mean KL(full || policy) over the document's forced steps, in nats; its measures are
    "agreement" (of the likeliest token), "perplexity", "top_k_recall" and "attention_error" (`kvx.eval.fidelity`).
    All records of a policy come one after the other: what is to be done again is whole policies.

    Args:
        model_name: what the records call it.
        prose: documents are from its second half.
        policies: those that are still to do.
        documents: how many; each from the start of its own part of the prose.
        prompt: tokens of each that are prefilled.
        forced: tokens of each that are forced, at least 2.
        most: of `fidelity`; at 0 the last two measures are left out.
        by_layer: of `fidelity`.
        seed: of where in the prose the first document begins.
        console: where progress goes; None: standard error.

    Raises:
        BadInput: prose too short for so many documents; see `fidelity`.
    """
    texts = seeded_documents(tokenizer, prose, documents, prompt + forced, seed)
    cell = Cell(model_name, TASK, prompt + forced, "agnostic")
    for first in range(0, len(policies), TOGETHER):
        together = policies[first : first + TOGETHER]
        for found in fidelity(decoder, texts, prompt, together, most=most, by_layer=by_layer, console=console):
            for index, text in enumerate(texts):
                yield fidelity_record(cell, index, text, found, index)


def seeded_documents(tokenizer: Any, prose: Prose, count: int, length: int, seed: int) -> Int[np.ndarray, "B T"]:
    """Held-out documents, whose paragraphs begin where chance says and go round."""
    paragraphs = prose.held_out
    first = int(np.random.default_rng([seed, *TASK.encode()]).integers(len(paragraphs)))
    return documents_of(tokenizer, paragraphs[first:] + paragraphs[:first], count, length)


def fidelity_record(cell: Cell, index: int, text: Int[np.ndarray, "T"], found: Fidelity, row: int) -> Record:
    """The record of one document.

    Args:
        cell: where it belongs.
        index: of the document in the cell.
        text: its token ids.
        found: what was measured.
        row: of the document in what was measured.
    """
    return Record(
        cell,
        found.policy,
        index,
        sha256=hashlib.sha256(np.asarray(text, "<i4").tobytes()).hexdigest(),
        tokens=len(text),
        depth=None,
        answers=(),
        expected=(),
        scores=(float(found.divergence[row]),),
        measures={name: float(values[row]) for name, values in found.measures().items()},
        cache_bytes=found.cache_bytes,
        bf16_bytes=found.bf16_bytes,
        bytes_read=found.bytes_read,
        policy_bytes=found.policy_bytes,
    )
