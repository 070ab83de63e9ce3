"""Variable tracking (RULER's, Hsieh et al. 2024, with several chains, as SCBench has it): who holds a value in the end.

Chains of assignments, each from a number through some hops, lie interleaved in prose. RULER's own setting is
`ruler/vt`.
"""

import re

import numpy as np

from kvx.eval.tasks.haystack import Haystack
from kvx.eval.tasks.options import within
from kvx.eval.tasks.placing import even_depths
from kvx.eval.tasks.planting import planted
from kvx.eval.tasks.registry import task
from kvx.eval.tasks.room import room
from kvx.eval.tasks.sample import Question, Sample
from kvx.eval.tasks.source import Source, random_of

LETTERS = 5
"""Capital letters of a name: all of one length, so that none is part of another."""

_TASK = "Assignments of variables are hidden in the text below. Memorise them and track what each variable holds.\n\n"


def share_of_names(answer: str, question: Question) -> float:
    """Share of the right names that occur in an answer, case apart (SCBench's score, which it rounds to hundredths).

    Names that are wrong cost nothing, as there.
    """
    names = re.findall(r"\w+", question.answers[0].lower())
    return sum(name in answer.lower() for name in names) / len(names)


@task("variable_tracking", score=share_of_names, group="tracing")
def variable_tracking(
    source: Source, length: int, count: int, seed: int, *, chains: int = 2, hops: int = 4
) -> list[Sample]:
    """All variables that hold a given value, directly or by assignment from another.

    Args:
        chains: values, each with variables of its own.
        hops: assignments of one variable to the next in each chain.
    """
    return _samples(source, length, count, seed, "variable_tracking", chains, hops, asked=1)


@task("shared/variable_tracking", score=share_of_names, group="shared context")
def shared_variable_tracking(
    source: Source, length: int, count: int, seed: int, *, chains: int = 4, hops: int = 2, questions: int = 4
) -> list[Sample]:
    """The variables of several values, one a question, over one text.

    Args:
        questions: as many as there are chains, or fewer.
    """
    return _samples(source, length, count, seed, "shared/variable_tracking", chains, hops, asked=questions)


def _samples(
    source: Source, length: int, count: int, seed: int, name: str, chains: int, hops: int, asked: int
) -> list[Sample]:
    within(name, "chains", chains, 1, 100)
    within(name, "hops", hops, 0, 100)
    within(name, "questions", asked, 1, chains)
    found = []
    for index in range(count):
        random = random_of(seed, name, length, index)
        names = _names(chains * (hops + 1), random).reshape(chains, hops + 1)
        values = 10_000 + random.choice(90_000, chains, replace=False)
        turns = random.permutation(np.repeat(np.arange(chains), hops + 1))  # whose assignment comes next
        places = sorted(even_depths(random, index, count, len(turns)))
        needles, given = [], [0] * chains
        for depth, chain in zip(places, turns, strict=True):
            at = given[chain]
            held = f"VAR {names[chain, at - 1]}" if at else values[chain]
            needles.append((depth, f"VAR {names[chain, at]} = {held}."))
            given[chain] += 1
        questions = [_question(source, int(values[chain]), names[chain].tolist()) for chain in range(asked)]
        answering = np.flatnonzero(turns < asked).tolist()
        build = planted(_TASK, Haystack.of(source, random), needles, questions, answering)
        found.append(source.largest(build, length, name))
    return found


def _question(source: Source, value: int, names: list[str]) -> Question:
    right = " ".join(names)
    return Question(
        f"\n\nFind all variables that hold the value {value} in the text above. There are {len(names)}.\n", (right,),
        f"The variables that hold the value {value} are:", new_tokens=room(source, right), stop=(".", "\n"),
    )  # fmt: skip


def _names(count: int, random: np.random.Generator) -> np.ndarray:
    """Different names of capital letters, in the order drawn."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(chr(65 + letter) for letter in random.integers(26, size=LETTERS))] = None
    return np.asarray(list(found))
