"""The words of RULER's prompts: nouns, adjectives and verbs of the wonderwords package."""

from collections.abc import Iterator
from functools import cache
from typing import Literal

import numpy as np


@cache
def words(kind: Literal["noun", "adjective", "verb"]) -> tuple[str, ...]:
    """The words of one kind, sorted."""
    from wonderwords import RandomWord

    return tuple(sorted(set(RandomWord().filter(include_categories=[kind]))))


@cache
def english() -> tuple[str, ...]:
    """The words of all three kinds, sorted, each once."""
    return tuple(sorted({*words("noun"), *words("adjective"), *words("verb")}))


def compound(random: np.random.Generator) -> str:
    """An adjective and a noun, joined by a hyphen."""
    adjectives, nouns = words("adjective"), words("noun")
    return f"{adjectives[random.integers(len(adjectives))]}-{nouns[random.integers(len(nouns))]}"


def shuffled(random: np.random.Generator) -> Iterator[str]:
    """All words in random order, then compounds without end; none twice."""
    listed = english()
    yield from (listed[at] for at in random.permutation(len(listed)))
    seen = set(listed)
    while True:
        word = compound(random)
        if word not in seen:
            seen.add(word)
            yield word
