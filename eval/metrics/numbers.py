"""Answers read as one number: the final one of a chain of thought, the first, or the last word."""

import re
from decimal import Decimal

from kvx.eval.tasks.sample import Question

# A sign counts unless it stands between two things, as in "7-3"; commas only between thousands.
_NUMBER = re.compile(r"((?<![\w)\]])[-\u2212])?\$?((?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?)", re.ASCII)
_FINAL = "####"
_BOXED = "\\boxed{"


def final_number(answer: str, question: Question) -> float:
    """1.0 if the number that an answer ends at is a right one (GSM8K).

    It is the number after the last "####" (GSM8K's own mark); without one, that in the last "\\boxed{...}"; without
    one, the last number. Signs, dollar signs, thousands' commas and decimals are understood: 1,234.00 is 1234.
    """
    said = extracted(answer)
    return float(said is not None and said in map(extracted, question.answers))


def first_number(answer: str, question: Question) -> float:
    """1.0 if the first number of an answer is a right one (InfiniteBench's Math.Find, SCBench's mf)."""
    said = next(iter(_numbers(answer)), None)
    return float(said is not None and said in map(extracted, question.answers))


def last_word_number(answer: str, question: Question) -> float:
    """1.0 if the last word of an answer is a right integer (InfiniteBench's Code.Run).

    Words are what blanks, full stops, colons, quotation marks and backticks separate.
    """
    words = re.sub("[\n.`'\":]", " ", answer).split()
    said = int(words[-1]) if words and re.fullmatch(r"[+-]?\d{1,18}", words[-1], re.ASCII) else None
    return float(said is not None and Decimal(said) in map(extracted, question.answers))


def extracted(text: str) -> Decimal | None:
    """The number that a text ends at, as `final_number` reads it; None if there is none."""
    for mark in (_FINAL, _BOXED):
        _, found, after = text.rpartition(mark)
        if found and (numbers := _numbers(after)):
            return numbers[0]
    return next(iter(_numbers(text)[-1:]), None)


def _numbers(text: str) -> list[Decimal]:
    return [Decimal(("-" if sign else "") + digits.replace(",", "")) for sign, digits in _NUMBER.findall(text)]
