"""Answers that must be right as a whole: to the letter, or but for case, punctuation, articles and blanks."""

from kvx.eval.metrics.normalise import normalised
from kvx.eval.tasks.sample import Question


def verbatim(answer: str, question: Question) -> float:
    """1.0 if the answer is a right one to the letter: of a question whose answers are chosen, not written."""
    return float(answer in question.answers)


def exact_match(answer: str, question: Question) -> float:
    """1.0 if the answer is a right one once both are normalised (SQuAD's exact match)."""
    return float(normalised(answer) in map(normalised, question.answers))
