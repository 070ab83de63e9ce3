"""Answers that count as right where they contain what was asked for, as words: a fact, a value, a name."""

import re

from kvx.eval.metrics.normalise import normalised
from kvx.eval.tasks.sample import Question


def normalised_substring(answer: str, question: Question) -> float:
    """1.0 if a right answer's words occur in the answer, one after the other, once both are normalised.

    A stand-in for a judge where right answers are short facts: it knows no paraphrase.
    """
    said = f" {normalised(answer)} "
    return float(any((words := normalised(right)) and f" {words} " in said for right in question.answers))


def word(answer: str, question: Question) -> float:
    """1.0 if a right answer is a word of the answer (InfiniteBench's Retrieve.KV).

    Words are what blanks and the marks : " ' . , ? ! { } separate.
    """
    return float(any(right in _words(answer) for right in question.answers))


def name(answer: str, question: Question) -> float:
    """1.0 if the first right answer, a name, is in the answer, case apart (InfiniteBench's En.Dia).

    Its words must follow one another; the published scorer looks for one word, so that names of several never match.
    """
    said, right = _words(answer.upper()), _words(question.answers[0].upper())
    return float(bool(right) and any(said[at : at + len(right)] == right for at in range(len(said))))


def _words(text: str) -> list[str]:
    return re.sub("[\n:\"'.,?!{}]", " ", text).split()
