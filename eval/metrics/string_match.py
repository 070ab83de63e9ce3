"""RULER's scores (Hsieh et al. 2024): whether the right texts occur in an answer, case apart."""

import re

from kvx.eval.tasks.sample import Question

_CONTROL = re.compile(r"[\x00-\x1f]")


def match_all(answer: str, question: Question) -> float:
    """The share of the right texts that occur in the answer.

    Substrings count, as published: "art" is found in "cart".
    """
    found = _found(answer, question)
    return sum(found) / len(found)


def match_part(answer: str, question: Question) -> float:
    """1.0 if one of the right texts occurs in the answer."""
    return float(any(_found(answer, question)))


def _found(answer: str, question: Question) -> list[bool]:
    # Control characters become line breaks, and the ends are cut, as the published scorer does.
    said = _CONTROL.sub("\n", answer.strip()).strip().lower()
    return [right.lower() in said for right in question.answers]
