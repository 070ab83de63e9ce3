"""Key-value retrieval (Liu et al. 2023, "Lost in the Middle"): the value of one key in a large JSON object."""

import uuid

import numpy as np

from kvx.eval.tasks.registry import task
from kvx.eval.tasks.sample import Question, Sample
from kvx.eval.tasks.source import Source, one, random_of, spread

_TASK = "Extract the value that belongs to the given key in the JSON object below.\n\n"


def contains(answer: str, question: Question) -> float:
    """1.0 if one of the right texts occurs in the answer, case apart."""
    return float(any(each.lower() in answer.lower() for each in question.answers))


@task("key_value", score=contains, group="retrieval", binary=True)
def key_value(
    source: Source, length: int, count: int, seed: int, *, digits: int = 8
) -> list[Sample]:
    """The value of one key among as many random pairs as fit.

    Args:
        digits: hexadecimal digits of keys and values; 32 writes whole UUIDs, as in the paper, which small models cannot
            copy.
    """
    found = []
    for index in range(count):
        random = random_of(seed, "key_value", length, index)

        def word(random: np.random.Generator = random) -> str:
            text = uuid.UUID(bytes=random.bytes(16), version=4)
            return str(text) if digits == 32 else text.hex[:digits]

        pairs: list[tuple[str, str]] = []

        def build(more: int, pairs=pairs, word=word, depth=spread(index, count)) -> Sample:
            total = more + 1
            while len(pairs) < total:
                pairs.append((word(), word()))
            at = min(int(depth * total), total - 1)
            lines = [f'"{key}": "{value}"' for key, value in pairs[:total]]
            # The asked pair is the first drawn, wherever it stands: growing the object does not change the question.
            lines.insert(at, lines.pop(0))
            before = _TASK + "{" + ",\n ".join(lines[:at]) + (",\n " if at else "")
            context = before + ",\n ".join(lines[at:]) + "}"
            key, value = pairs[0]
            asked = Question(f'\n\nKey: "{key}"\n', (value,), f'The value of "{key}" is "', new_tokens=24, stop=('"',))
            return one(context, asked, evidence=((len(before), len(before) + len(lines[at])),), depth=at / total)

        found.append(source.largest(build, length, "key_value"))
    return found
