"""How alike the next line of code is to the one that was written: LongBench's code tasks."""

import difflib

from kvx.eval.tasks.sample import Question

_NOT_CODE = ("`", "#", "//")


def edit_similarity(answer: str, question: Question) -> float:
    """Similarity of the answer's first line of code with a right one, best over the right answers, in whole percent.

    2 M / (a + b), with M the characters in matching blocks (Ratcliff and Obershelp, as `difflib` finds them) and a and
    b the lengths: `fuzz.ratio` of the package fuzzywuzzy where python-Levenshtein is not installed, which rounds to a
    percent. The first line of code is the first without a backtick, "#" or "//".
    """
    lines = answer.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in _NOT_CODE)), "")
    return max(round(100 * difflib.SequenceMatcher(None, line, right).ratio()) / 100 for right in question.answers)
