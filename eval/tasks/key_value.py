"""Key-value retrieval (Liu et al. 2023, "Lost in the Middle"): the values of keys in a large JSON object."""

import uuid

import numpy as np

from kvx.eval.metrics.string_match import match_part
from kvx.eval.tasks.filling import filled
from kvx.eval.tasks.options import within
from kvx.eval.tasks.placing import even_depths, interleave, joined
from kvx.eval.tasks.registry import task
from kvx.eval.tasks.room import room
from kvx.eval.tasks.sample import Question, Sample
from kvx.eval.tasks.source import Source, random_of

_TASK = "Extract the value that belongs to the given key in the JSON object below.\n\n"


def hexadecimal(random: np.random.Generator, digits: int) -> str:
    """A random string of hexadecimal digits; all 32 as a UUID, dashes included."""
    text = uuid.UUID(bytes=random.bytes(16), version=4)
    return str(text) if digits == 32 else text.hex[:digits]


@task("key_value", score=match_part, group="retrieval", binary=True)
def key_value(source: Source, length: int, count: int, seed: int, *, digits: int = 8) -> list[Sample]:
    """The value of one key among as many random pairs as fit.

    Args:
        digits: hexadecimal digits of keys and values; 32 writes whole UUIDs, as in the paper, which small models cannot
            copy.
    """
    return _samples(source, length, count, seed, "key_value", digits, asked=1)


@task("shared/key_value", score=match_part, group="shared context")
def shared_key_value(
    source: Source, length: int, count: int, seed: int, *, digits: int = 8, questions: int = 4
) -> list[Sample]:
    """The values of several keys, one a question, over one object (SCBench, Li et al. 2025: Retr.KV)."""
    return _samples(source, length, count, seed, "shared/key_value", digits, asked=questions)


def _samples(source: Source, length: int, count: int, seed: int, name: str, digits: int, asked: int) -> list[Sample]:
    within(name, "digits", digits, 5, 32)  # fewer would repeat keys
    within(name, "questions", asked, 1)
    found = []
    for index in range(count):
        random = random_of(seed, name, length, index)
        at = even_depths(random, index, count, asked)
        pairs: dict[str, str] = {}

        def build(more: int, random=random, at=at, pairs=pairs) -> Sample:
            while len(pairs) < asked + more:
                pairs.setdefault(hexadecimal(random, digits), hexadecimal(random, digits))
            # The asked pairs are the first drawn, wherever they stand: a larger object has the same questions.
            drawn = list(pairs.items())[: asked + more]
            lines = [f'"{key}": "{value}"' for key, value in drawn]
            lines, places = interleave(lines[:asked], lines[asked:], at)
            context, evidence = joined(_TASK + "{", lines, ",\n ", "}", places)
            questions = tuple(_question(source, key, value) for key, value in drawn[:asked])
            return Sample(context, questions, evidence, places[0] / len(lines) if asked == 1 else None)

        found.append(filled(source, build, length, name))
    return found


def _question(source: Source, key: str, value: str) -> Question:
    # The answer opens as the object's line does, which even a small model knows how to go on.
    opening = f'"{key}": "'
    return Question(f'\n\nKey: "{key}"\n', (value,), opening, new_tokens=room(source, value + '"'), stop=('"',))
