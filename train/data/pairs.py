"""Preferences for DPO: prompts with a chosen and a rejected answer, as rows of one document each."""

from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import Int

from kvx.errors import BadInput
from kvx.models.chat_template import ChatRenderer
from kvx.models.tokenizer import Tokenizer
from kvx.train.batch import Batch, Pairs
from kvx.train.data.documents import read_lines
from kvx.train.data.files import LINES, expand
from kvx.train.data.stream import TOKENISING, Stream, fingerprint

FIELDS = ("prompt", "chosen", "rejected")


def open_pairs(paths: Sequence[str], name: str) -> list[dict[str, str]]:
    """Preferences from JSONL files (.gz too) with the texts "prompt", "chosen" and "rejected" on every line.

    Raises:
        BadInput: a path that cannot be read, a broken line or a missing text, by file and number; no pair at all.
    """
    found = []
    for file in expand(paths, name, LINES):
        for where, row in read_lines(file):
            for field in FIELDS:
                value = row.get(field) if isinstance(row, dict) else None
                if not isinstance(value, str) or not value:
                    raise BadInput(f"{where}: {field!r} is {value!r}; allowed: a text that is not empty")
            found.append({field: row[field] for field in FIELDS})
    if not found:
        raise BadInput(f"{name}={list(paths)!r} holds no pair; allowed: at least one line")
    return found


def pair_batches(
    pairs: Sequence[dict[str, str]],
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
        tokenizer: writes the prompt as a user's turn if it has a chat template.
        sequence: tokens of a row; an answer that does not fit is cut.
        prompt: tokens of a prompt at most; of a longer one its last are kept.
        batch: pairs of a batch, over all processes.
        share, shares: which part of every batch is this process's, and how many parts there are.

    Raises:
        BadInput: pairs that the processes cannot share evenly.
    """
    if batch % shares:
        raise BadInput(f"batch={batch} over {shares} processes; allowed: a multiple of them")
    size, render = batch // shares, ChatRenderer()

    def encode(pair: dict[str, str]) -> dict[str, np.ndarray]:
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


def prompt_ids(prompt: str, tokenizer: Tokenizer, render: ChatRenderer) -> list[int]:
    """A prompt as the model is asked: a turn of its chat template if it has one, plain text otherwise."""
    if not tokenizer.has_chat_template:
        return tokenizer.encode(prompt)
    turn = [{"role": "user", "content": prompt}]
    return tokenizer.encode(tokenizer.chat(turn, render=render), add_special=False)


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
