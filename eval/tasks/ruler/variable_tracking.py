"""RULER's variable tracking: a value is assigned, and four more variables are assigned one another, between noise."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from string import ascii_uppercase

import numpy as np

from kvx.eval.metrics.string_match import match_all
from kvx.eval.tasks.registry import task
from kvx.eval.tasks.ruler.lines import Lines
from kvx.eval.tasks.sample import Question, Sample
from kvx.eval.tasks.source import Source, one, random_of

HOPS = 4
EXAMPLE = 500
"""Tokens of the worked example."""

_TASK = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"


@task("ruler/vt", score=match_all, group="ruler")
def variable_tracking(source: Source, length: int, count: int, seed: int) -> list[Sample]:
    """The five variables that hold a value, by way of four assignments.

    A worked example of its own names, value and places stands first. Lines keep their order at places drawn without
    regard to the samples' count; a sample's depth is that of its first line.
    """
    found = []
    for index in range(count):
        random = random_of(seed, "ruler/vt", length, index)
        shown, asked = (str(10_000 + each) for each in random.choice(89_999, 2, replace=False))
        small = _family("", shown, 3, random)
        # Where tokens are short, the least example is the example.
        room = max(EXAMPLE, source.size(_plain(small(0))))
        solved = source.largest(lambda size, small=small: _plain(small(size)), room, "ruler/vt")
        (question,) = solved.questions
        example = f"{solved.context}{question.text}{question.prefix} {' '.join(question.answers)}\n\n"
        build = _family(example, asked, 5, random)
        found.append(source.largest(build, length, "ruler/vt", spare=build(0).questions[0].new_tokens))
    return found


def _family(before: str, value: str, letters: int, random: np.random.Generator) -> Callable[[int], Sample]:
    """The samples of one chain, by their clauses of noise."""
    names: dict[str, None] = {}
    while len(names) <= HOPS:
        name = "".join(random.choice(list(ascii_uppercase), letters))
        if name != "VAR":
            names[name] = None
    # The blank at the end of a line is the published one.
    links = (f"VAR {new} = VAR {old} " for old, new in pairwise(names))
    chain = list(zip(sorted(random.random(HOPS + 1)), (f"VAR {next(iter(names))} = {value}", *links), strict=True))
    question = Question(
        f"\nQuestion: Find all variables that are assigned the value {value} in the text above.",
        tuple(names),
        " Answer: According to the chain(s) of variable assignment in the text above, "
        f"{len(names)} variables are assigned the value {value}, they are: ",
        new_tokens=30,
    )
    opening, hay = before + _TASK, Lines.noise()

    def build(size: int) -> Sample:
        text, spans, depths = hay.hide(size, chain)
        evidence = tuple((len(opening) + start, len(opening) + end) for start, end in spans)
        return one(opening + text, question, evidence=evidence, depth=depths[0])

    return build


def _plain(sample: Sample) -> Sample:
    return replace(sample, plain=True)
