"""Labelled prompts: a prefix and any number of contexts a row, as one right-padded batch."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from kvx.errors import BadInput


class LabelledPrompt(NamedTuple):
    """What `labelled_prompt` returns; padding has token and label 0."""

    tokens: Int[np.ndarray, "B T"]
    lengths: Int[np.ndarray, "B"]
    labels: Int[np.ndarray, "B T"]


def labelled_prompt(prefixes: Sequence[Sequence[int]], contexts: Sequence[Sequence[Sequence[int]]]) -> LabelledPrompt:
    """One row for each prefix: its tokens with label 0, then its contexts with labels 1, 2, ...

    Args:
        prefixes: token ids; what every context of the row is read behind (a start token at least is advisable).
        contexts: of each row, the token ids of any number of contexts.

    Raises:
        BadInput: no rows, another number of rows in `contexts`, an empty context, or a row without any token.
    """
    if len(prefixes) != len(contexts) or not len(prefixes):
        raise BadInput(
            f"prefixes has {len(prefixes)} rows and contexts {len(contexts)}; allowed: one of each for every row, and "
            "at least one row"
        )
    rows = []
    for index, (prefix, texts) in enumerate(zip(prefixes, contexts, strict=True)):
        parts = [np.asarray(part, np.int32).reshape(-1) for part in (prefix, *texts)]
        if any(not part.size for part in parts[1:]) or not sum(part.size for part in parts):
            raise BadInput(f"contexts holds an empty text in row {index}; allowed: at least one token in each")
        labels = np.repeat(np.arange(len(parts), dtype=np.int32), [part.size for part in parts])
        rows.append((np.concatenate(parts), labels))
    lengths = np.asarray([len(tokens) for tokens, _ in rows], np.int32)
    tokens, labels = (np.zeros((len(rows), lengths.max()), np.int32) for _ in range(2))
    for index, (row, own) in enumerate(rows):
        tokens[index, : len(row)], labels[index, : len(own)] = row, own
    return LabelledPrompt(tokens, lengths, labels)
