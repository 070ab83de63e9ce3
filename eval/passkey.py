"""Passkey retrieval (Mohtashami and Jaggi 2023): a number hidden in prose, at a chosen depth, in an exact token length.

Two protocols (SCBench's distinction): question-agnostic, where the context alone is prefilled and compressed and the
question then goes through the decode path; and question-aware, where the question is part of the prefilled prompt, so
that a policy that looks at the last queries may use it.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from kvx.errors import BadInput
from kvx.prose import Prose, sentences

DIGITS = 5
ANSWER = 10
"""New tokens an answer may take: the digits and what a model says before them."""

_TASK = (
    "There is a pass key hidden in the text below. Find it and memorise it. I will ask you about it after the text.\n\n"
)
_QUESTION = "\n\nWhat is the pass key in the text above?\nThe pass key is"


@dataclass(frozen=True)
class Passkey:
    """One prompt.

    Attributes:
        key: the digits.
        context: token ids up to and including the prose.
        question: token ids that follow: the question and the opening of the answer.
        span: first and one past the last place of the sentence with the key, in `context`.
        depth: share of the prose that comes before that sentence.
    """

    key: str
    context: tuple[int, ...]
    question: tuple[int, ...]
    span: tuple[int, int]
    depth: float

    @property
    def tokens(self) -> tuple[int, ...]:
        """The whole prompt."""
        return self.context + self.question

    def correct(self, answer: str) -> bool:
        """Whether the first number of an answer is the key."""
        digits = re.search(r"\d+", re.sub(r"(?<=\d)[ ,](?=\d)", "", answer))
        return digits is not None and digits[0] == self.key


def passkeys(tokenizer: Any, prose: Prose, length: int, depths: Sequence[float], seed: int) -> list[Passkey]:
    """One prompt of exactly `length` tokens, question included, for each depth.

    Args:
        tokenizer: the model's.
        prose: haystacks come from its first half, each from another place.
        depths: share of the prose that comes before the key, rounded to whole sentences; 0 and 1 put it at the ends.
        seed: of keys and places; equal seeds give equal prompts.

    Raises:
        BadInput: a length too short for the frame of the prompt, or longer than the prose.
    """
    hay = [tokenizer.encode(" " + sentence, add_special=False) for sentence in sentences(prose.haystack)]
    head, tail = _frame(tokenizer)
    found = []
    for index, depth in enumerate(depths):
        random = np.random.default_rng([seed, length, index])
        key = str(random.integers(10 ** (DIGITS - 1), 10**DIGITS))
        needle = tokenizer.encode(f" The pass key is {key}. Remember it. {key} is the pass key.", add_special=False)
        room = length - len(head) - len(tail) - len(needle)
        if room < 1:
            raise BadInput(f"length={length} is too short for a passkey prompt; allowed: at least {length - room + 1}")
        before, after = _haystack(hay, room, depth, random, length)
        context = head + before + needle + after
        start = len(head) + len(before)
        found.append(
            Passkey(key, tuple(context), tuple(tail), (start, start + len(needle)), len(before) / max(room, 1))
        )
    return found


def spread(count: int) -> tuple[float, ...]:
    """`count` depths in the middles of equal parts of the text."""
    return tuple((index + 0.5) / count for index in range(count))


def _frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids before the prose and after it."""
    # Plain text even where there is a chat template: with SmolLM2-135M-Instruct's full cache it found 6 of 6 keys at
    # 1024 tokens and 4 of 4 at 2048, the chat template with the same opening of the answer 4 of 6, without it 3 of 6.
    return tokenizer.encode(_TASK), tokenizer.encode(_QUESTION, add_special=False)


def _haystack(
    hay: list[list[int]], room: int, depth: float, random: np.random.Generator, length: int
) -> tuple[list[int], list[int]]:
    """`room` tokens of consecutive sentences from a random place, split at the sentence end nearest to the depth.

    The first sentence loses its beginning, so that the length is exact and every seam lies between sentences.
    """
    if sum(map(len, hay)) < room:
        raise BadInput(
            f"length={length} is longer than the prose to hide a key in; allowed: at most "
            f"{length - room + sum(map(len, hay))}"
        )
    start, taken, chosen = int(random.integers(len(hay))), 0, []
    while taken < room:
        chosen.append(hay[(start + len(chosen)) % len(hay)])
        taken += len(chosen[-1])
    surplus = taken - room
    ends = np.maximum(np.cumsum([0, *map(len, chosen)]) - surplus, 0)
    split = int(ends[np.argmin(np.abs(ends - depth * room))])
    tokens = list(chain.from_iterable(chosen))[surplus:]
    return tokens[:split], tokens[split:]
