"""Answers read as whole numbers: all of them, the first, or a list from its beginning."""

import re

from kvx.eval.tasks.sample import Question


def integer_share(answer: str, question: Question) -> float:
    """Share of the integers in the answer that are the right one; 0 if there are none.

    The right one is the first integer of a right answer: "7", "Paragraph 7", "段落7". LongBench's count and its two
    retrieval scores in one; an answer that goes on and on loses by it, as published.
    """
    said = re.findall(r"\d+", answer)
    return max(said.count(_first(right)) for right in question.answers) / len(said) if said else 0.0


def first_integer(answer: str, question: Question) -> float:
    """1.0 if the answer's first run of digits is a right one, digit by digit (InfiniteBench's passkeys)."""
    said = _first(answer)
    return float(bool(said) and said in map(_first, question.answers))


def leading_integers(answer: str, question: Question) -> float:
    """Share of the right list, from its beginning, that the answer's integers repeat (InfiniteBench's Math.Calc).

    A minus sign that does not follow a digit counts; the published scorer reads no signs, so that negative values
    never match there.
    """
    said = _signed(answer)
    return max(_agreement(said, _signed(right)) for right in question.answers)


def _first(text: str) -> str:
    found = re.search(r"\d+", text)
    return found[0] if found else ""


def _signed(text: str) -> list[str]:
    return re.findall(r"(?<!\d)-\d+|\d+", text)


def _agreement(said: list[str], right: list[str]) -> float:
    for at, value in enumerate(right):
        if said[at : at + 1] != [value]:
            return at / len(right)
    return float(bool(right))
