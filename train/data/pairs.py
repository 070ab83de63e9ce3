"""Preferences for DPO: prompts with a chosen and a rejected answer, as rows of one document each."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import grain
import numpy as np
from jaxtyping import Int

from kvx.errors import BadInput
from kvx.models.chat_template import ChatRenderer
from kvx.models.tokenizer import Tokenizer
from kvx.train.batch import Batch, Pairs
from kvx.train.data.documents import check_messages, read_lines
from kvx.train.data.files import LINES, TABLES, expand, suffix
from kvx.train.data.stream import TOKENISING, Stream, fingerprint
from kvx.train.data.tables import read_column

FIELDS = ("prompt", "chosen", "rejected")
PREFERENCES = (*LINES, *TABLES)
ALLOWED = "a text that is not empty, or a list of messages"


Pair = dict[str, Any]
"""The prompt, a text or a list of messages; and the texts of both answers."""


def open_pairs(paths: Sequence[str], name: str) -> list[Pair]:
    """Preferences from JSONL (.gz too), Parquet or Arrow files with "prompt", "chosen" and "rejected" in every row.

    Each is a text or a list of messages. The last message of an answer is the assistant's, and what is learned; those
    before it, the same for both answers, are the prompt, in the place of "prompt", which may then be missing.

    Raises:
        BadInput: a path that cannot be read; a broken row, by file and number; no pair at all.
    """
    found = [_pair(where, row) for file in expand(paths, name, PREFERENCES) for where, row in _rows(file)]
    if not found:
        raise BadInput(f"{name}={list(paths)!r} holds no pair; allowed: at least one line")
    return found


def _rows(file: Path) -> Iterator[tuple[str, Any]]:
    """Where each row is, and its fields."""
    if suffix(file) in LINES:
        yield from read_lines(file)
        return
    columns = {side: read_column(file, side) for side in FIELDS[1:]}
    with suppress(BadInput):  # a table without prompts: its messages hold them, or else `_pair` misses them
        columns["prompt"] = read_column(file, "prompt")
    for number in range(len(columns["chosen"])):
        yield f"{file}:{number + 1}", {field: column[number] for field, column in columns.items()}


def _pair(where: str, row: Any) -> Pair:
    given = row if isinstance(row, dict) else {}
    before, answers = zip(*(_answer(f"{where}: {side!r}", given.get(side)) for side in FIELDS[1:]), strict=True)
    if before[0] != before[1]:
        raise BadInput(f"{where}: 'chosen' and 'rejected' have other messages before their last; allowed: the same")
    prompt = before[0] or given.get("prompt")
    if not isinstance(prompt, str | list) or not prompt:
        raise BadInput(f"{where}: 'prompt' is {prompt!r}; allowed: {ALLOWED}")
    if isinstance(prompt, list):
        check_messages(prompt, f"{where}: 'prompt': ")
    return {"prompt": prompt, **dict(zip(FIELDS[1:], answers, strict=True))}


def _answer(where: str, value: Any) -> tuple[list[Any], str]:
    """The messages before an answer, if it is one of messages, and its text."""
    before, text = [], value
    if isinstance(value, list) and value:
        check_messages(value, f"{where}: ")
        *before, last = value
        if last["role"] != "assistant":
            raise BadInput(f"{where} ends with a message of {last['role']!r}; allowed: of 'assistant'")
        text = last["content"]
    if not isinstance(text, str) or not text:
        raise BadInput(f"{where} is {text!r}; allowed: {ALLOWED}")
    return before, text


def pair_batches(
    pairs: Sequence[Pair],
    tokenizer: Tokenizer,
    *,
    sequence: int,
    prompt: int,
    batch: int,
    seed: int = 0,
    share: int = 0,
    shares: int = 1,
) -> Stream:
    """Endless batches of `Pairs` in an order by the seed, anew every epoch.

    Args:
        tokenizer: writes the prompt as a user's turn if it has a chat template; messages need one.
        sequence: tokens of a row; an answer that does not fit is cut.
        prompt: tokens of a prompt at most; of a longer one its last are kept.
        batch: pairs of a batch, over all processes.
        share, shares: which part of every batch is this process's, and how many parts there are.

    Raises:
        BadInput: pairs that the processes cannot share evenly; messages without a chat template.
    """
    if not tokenizer.has_chat_template and any(isinstance(pair["prompt"], list) for pair in pairs):
        raise BadInput("data.pairs.train has prompts of messages, and the model no chat template; allowed: texts")
    if batch % shares:
        raise BadInput(f"batch={batch} over {shares} processes; allowed: a multiple of them")
    size, render = batch // shares, ChatRenderer()

    def encode(pair: Pair) -> dict[str, np.ndarray]:
        asked = prompt_ids(pair["prompt"], tokenizer, render)[-prompt:]
        answers = {side: _row(asked, answer_ids(pair[side], tokenizer), sequence) for side in FIELDS[1:]}
        return {f"{side}_{part}": array for side, row in answers.items() for part, array in row.items()}

    def mine(rows: dict[str, np.ndarray]) -> Pairs:
        part = {name: array[share * size : (share + 1) * size] for name, array in rows.items()}
        chosen, rejected = (
            Batch(part[f"{side}_tokens"], part[f"{side}_segments"], part[f"{side}_positions"], part[f"{side}_mask"])
            for side in FIELDS[1:]
        )
        return Pairs(chosen, rejected)

    ordered = grain.MapDataset.source(pairs).seed(seed).shuffle().repeat()
    pipeline = ordered.map(encode).to_iter_dataset(TOKENISING).batch(batch).map(mine)
    facts = {"pairs": len(pairs), "text": fingerprint(pairs), "sequence": sequence, "prompt": prompt}
    facts |= {"batch": batch, "seed": seed}
    return Stream(pipeline, facts)


def prompt_ids(prompt: str | list[Any], tokenizer: Tokenizer, render: ChatRenderer) -> list[int]:
    """A prompt as the model is asked: by its chat template if it has one, a text as a user's turn; else plain text."""
    if isinstance(prompt, str) and not tokenizer.has_chat_template:
        return tokenizer.encode(prompt)
    turns = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    return tokenizer.encode(tokenizer.chat(turns, render=render), add_special=False)


def answer_ids(answer: str, tokenizer: Tokenizer) -> list[int]:
    """An answer with the token that ends it."""
    return [*tokenizer.encode(answer, add_special=False), *tokenizer.eos_ids[:1]]


def _row(asked: list[int], answer: list[int], sequence: int) -> dict[str, Int[np.ndarray, "T"]]:
    """A prompt with its answer; only the answer is to be learned."""
    ids = (asked + answer)[:sequence]
    index = np.arange(sequence, dtype=np.int32)
    real = index < len(ids)
    tokens: Any = np.zeros(sequence, np.int32)
    tokens[: len(ids)] = ids
    return {
        "tokens": tokens,
        "segments": real.astype(np.int32),
        "positions": np.where(real, index, -1),
        "mask": real & (index >= len(asked)),
    }
