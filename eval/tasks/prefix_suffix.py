"""Prefix and suffix retrieval (SCBench, Li et al. 2025): the one string of a long list that begins and ends so."""

import numpy as np

from kvx.eval.metrics.string_match import match_part
from kvx.eval.tasks.filling import filled
from kvx.eval.tasks.options import within
from kvx.eval.tasks.placing import even_depths, interleave, joined
from kvx.eval.tasks.registry import task
from kvx.eval.tasks.room import room
from kvx.eval.tasks.sample import Question, Sample
from kvx.eval.tasks.source import Source, random_of

ENDS, MIDDLE = 4, 8
"""Letters of a prefix or suffix, and letters between them."""

_TASK = "Memorise the strings in the list below. I will ask you for one of them by its beginning and its end.\n\n"


@task("shared/prefix_suffix", score=match_part, group="shared context")
def prefix_suffix(source: Source, length: int, count: int, seed: int, *, questions: int = 4) -> list[Sample]:
    """The strings with given beginnings and ends, one a question, in a list of random letters.

    For each of them the list has one that only begins like it and one that only ends like it: neither half is enough.
    """
    name = "shared/prefix_suffix"
    within(name, "questions", questions, 1)
    found = []
    for index in range(count):
        random = random_of(seed, name, length, index)
        at = even_depths(random, index, count, questions)
        ends = [(_letters(random, ENDS), _letters(random, ENDS)) for _ in range(questions)]
        right = [first + _letters(random, MIDDLE) + last for first, last in ends]
        near = [
            each
            for first, last in ends
            for each in (first + _letters(random, MIDDLE + ENDS), _letters(random, ENDS + MIDDLE) + last)
        ]
        asked = tuple(_question(source, *each, text) for each, text in zip(ends, right, strict=True))
        rest: list[str] = []

        def build(more: int, random=random, at=at, right=right, near=near, asked=asked, rest=rest) -> Sample:
            while len(rest) < more:
                rest.append(_letters(random, ENDS + MIDDLE + ENDS))
            # Near misses are spread through the whole list: a longer list has the same ones.
            others, _ = interleave(near, rest[:more], np.linspace(0, 1, len(near), endpoint=False).tolist())
            lines, places = interleave(right, others, at)
            context, evidence = joined(_TASK, lines, "\n", "", places)
            return Sample(context, asked, evidence)

        found.append(filled(source, build, length, name))
    return found


def _question(source: Source, first: str, last: str, right: str) -> Question:
    return Question(
        f"\n\nWhich string in the list above begins with {first} and ends with {last}?\n", (right,),
        "The string is", new_tokens=room(source, right), stop=(".", "\n"),
    )  # fmt: skip


def _letters(random: np.random.Generator, count: int) -> str:
    return "".join(chr(97 + letter) for letter in random.integers(26, size=count))
