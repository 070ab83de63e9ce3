"""RULER's needles in a haystack: sentences that give keys values, hidden in filling text, and asked for by key.

Eight tasks of one generator; the needle-in-a-haystack family (single, multi-key, multi-value, multi-query) are these.
The original needle (Kamradt 2023, a sentence about San Francisco) needs a judge model, and a model knows its answer
without the text.

The published essays are not ours to give: prose is `Source.prose`, Python's documentation or the user's folder, begun
at another sentence in each sample. Scores on it compare policies, and come near published ones without being them.
"""

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from kvx.eval.metrics.string_match import match_all
from kvx.eval.tasks.haystack import Haystack
from kvx.eval.tasks.registry import task
from kvx.eval.tasks.ruler.lines import Lines
from kvx.eval.tasks.ruler.word_lists import compound
from kvx.eval.tasks.sample import Question, Sample
from kvx.eval.tasks.source import Source, one, random_of, spread

Kind = Literal["numbers", "words", "uuids"]

DEPTHS = np.round(np.linspace(0, 100, 40)) / 100
"""Where needles lie in prose: forty evenly spaced percentages."""

_DRAW: dict[Kind, Callable[[np.random.Generator], str]] = {
    "numbers": lambda random: str(random.integers(10**6, 10**7)),
    "words": compound,
    "uuids": lambda random: str(uuid.UUID(bytes=random.bytes(16), version=4)),
}


@dataclass(frozen=True)
class Needles:
    """What is hidden where, and how much of it is asked for.

    Attributes:
        about: one line.
        haystack: "noise": five clauses over and over; "essay": prose; "needle": lines that are needles of other keys.
        key, value: what keys and values are.
        keys: that are hidden.
        values: of each key, one needle each.
        queries: keys that are asked for.
    """

    about: str
    haystack: Literal["noise", "essay", "needle"]
    key: Kind = "words"
    value: Kind = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1

    @property
    def wanted(self) -> int:
        """Values that are asked for."""
        return self.queries * self.values

    def sample(self, source: Source, name: str, length: int, depth: float, random: np.random.Generator) -> Sample:
        """One sample, its first evidence at a depth in [0, 1)."""
        taken: set[str] = set()

        def fresh(kind: Kind) -> str:
            while (text := _DRAW[kind](random)) in taken:
                pass
            taken.add(text)
            return text

        table = {fresh(self.key): tuple(fresh(self.value) for _ in range(self.values)) for _ in range(self.keys)}
        # Depths go to the needles at random, so that the first keys may well be the ones that are asked for.
        needles = [self._needle(key, value) for key, values in table.items() for value in values]
        placed = list(zip(self._depths(depth, random), needles, strict=True))
        hay = self._hay(source, random, lambda: self._needle(fresh(self.key), fresh(self.value)))
        opening, question = self._prompt(list(table)[: self.queries], table)

        def build(size: int) -> Sample:
            text, spans, depths = hay.hide(size, placed)
            evidence = tuple((len(opening) + first, len(opening) + last) for first, last in spans[: self.wanted])
            return one(opening + text, question, evidence=evidence, depth=depths[0])

        return source.largest(build, length, name, spare=question.new_tokens)

    def _needle(self, key: str, value: str) -> str:
        return f"One of the special magic {self.value} for {key} is: {value}."

    def _hay(self, source: Source, random: np.random.Generator, another: Callable[[], str]) -> Haystack | Lines:
        """The filling text; `another` draws a needle that no one asks for."""
        if self.haystack == "essay":
            return Haystack.of(source, random)
        if self.haystack == "noise":
            return Lines.noise()
        drawn: list[str] = []

        def line(number: int) -> str:
            while len(drawn) <= number:
                drawn.append(another())
            return drawn[number]

        return Lines.of(source, line)

    def _depths(self, first: float, random: np.random.Generator) -> list[float]:
        """The first as given, the others drawn: in prose none twice."""
        others = self.keys * self.values - 1
        if self.haystack != "essay":
            return [first, *random.random(others)]
        slot = int(first * len(DEPTHS))
        free = [each for each in random.permutation(len(DEPTHS)) if each != slot]
        return [float(DEPTHS[each]) for each in (slot, *free[:others])]

    def _prompt(self, asked: list[str], table: dict[str, tuple[str, ...]]) -> tuple[str, Question]:
        """What stands before the text, and the question; in the singular where there is one value."""
        many = self.wanted > 1
        what = self.value if many else self.value.removesuffix("s")
        query = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"
        opening = (
            f"{f'Some special magic {what} are' if many else f'A special magic {what} is'} hidden within the following "
            f"text. Make sure to memorize it. I will quiz you about the {what} afterwards.\n"
        )
        subject = f"the special magic {what} for {query} mentioned in the provided text"
        return opening, Question(
            f"\nWhat {'are all' if many else 'is'} {subject}?",
            tuple(value for key in asked for value in table[key]),
            f" T{subject[1:]} {'are' if many else 'is'}",
            new_tokens=128,
        )


NEEDLES = {
    "niah_single_1": Needles("A number of one key among five clauses over and over.", "noise"),
    "niah_single_2": Needles("A number of one key in prose.", "essay"),
    "niah_single_3": Needles("A UUID of one key in prose.", "essay", value="uuids"),
    "niah_multikey_1": Needles("The number of one of four keys in prose.", "essay", keys=4),
    "niah_multikey_2": Needles("The number of one key among lines that give numbers to other keys.", "needle"),
    "niah_multikey_3": Needles(
        "The UUID of one UUID among lines that give UUIDs.", "needle", key="uuids", value="uuids"
    ),
    "niah_multivalue": Needles("All four numbers of one key in prose.", "essay", values=4),
    "niah_multiquery": Needles("The numbers of all four keys in prose.", "essay", keys=4, queries=4),
}


def _register(name: str, needles: Needles) -> None:
    def make(source: Source, length: int, count: int, seed: int) -> list[Sample]:
        return [
            needles.sample(source, name, length, spread(index, count), random_of(seed, name, length, index))
            for index in range(count)
        ]

    make.__doc__ = needles.about
    task(name, score=match_all, group="ruler", binary=needles.wanted == 1)(make)


for _name, _needles in NEEDLES.items():
    _register(f"ruler/{_name}", _needles)
