"""Turns of two kinds over one context (SCBench's multi-task sessions, Li et al. 2025): facts in words, and keys.

SCBench mixes a semantic and a string retrieval in the same way (its functions and keys). A policy that was shaped by
the first kind of question meets the other.
"""

from kvx.eval.metrics.string_match import match_part
from kvx.eval.tasks.haystack import Haystack
from kvx.eval.tasks.key_value import hexadecimal
from kvx.eval.tasks.needle_facts import NAMES, facts_of
from kvx.eval.tasks.options import within
from kvx.eval.tasks.placing import even_depths
from kvx.eval.tasks.planting import planted
from kvx.eval.tasks.registry import task
from kvx.eval.tasks.room import room
from kvx.eval.tasks.sample import Question, Sample
from kvx.eval.tasks.source import Source, random_of

DIGITS = 8
"""Of keys and values, hexadecimal."""

_TASK = "Facts, and values of keys, are hidden in the text below. Memorise them. I will ask you about both.\n\n"


@task("shared/mixed", score=match_part, group="shared context")
def mixed(source: Source, length: int, count: int, seed: int, *, questions: int = 4) -> list[Sample]:
    """Where somebody left something, and the value of a key, in turn; as many more of both are hidden and not asked."""
    name = "shared/mixed"
    within(name, "questions", questions, 2, len(NAMES))
    found = []
    for index in range(count):
        random = random_of(seed, name, length, index)
        facts = facts_of(random, questions)
        pairs = [(hexadecimal(random, DIGITS), hexadecimal(random, DIGITS)) for _ in range(questions)]
        asked, others = [], []
        for turn, (fact, pair) in enumerate(zip(facts, pairs, strict=True)):
            kinds = ((fact.text, fact.question(source)), (_sentence(*pair), _question(source, *pair)))
            asked.append(kinds[turn % 2])
            others.append(kinds[1 - turn % 2][0])
        sentences = [*(sentence for sentence, _ in asked), *others]
        places = [*even_depths(random, index, count, questions), *random.random(questions).tolist()]
        build = planted(
            _TASK, Haystack.of(source, random), list(zip(places, sentences, strict=True)),
            [question for _, question in asked], range(questions),
        )  # fmt: skip
        found.append(source.largest(build, length, name))
    return found


def _sentence(key: str, value: str) -> str:
    return f'The value of "{key}" is "{value}".'


def _question(source: Source, key: str, value: str) -> Question:
    return Question(
        f'\n\nWhat is the value of the key "{key}"?\n', (value,), f'The value of "{key}" is "',
        new_tokens=room(source, value + '"'), stop=('"',),
    )  # fmt: skip
