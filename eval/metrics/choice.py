"""Answers that choose one of four lettered options, read from free text by each benchmark's rules."""

import re

from kvx.eval.tasks.sample import Question

LETTERS = "ABCD"


def choice(answer: str, question: Question) -> float:
    """1.0 if the answer chooses the right option (InfiniteBench's En.MC, SCBench's choice_eng).

    The first rule that applies decides: the answer's first letter is one of A to D; the answer is an option's text;
    what follows the first of "answer is:", "answer:", "answer is", "option is" begins with a right answer; the first
    word that is one of A to D. "A man" therefore chooses A, as published.

    Args:
        answer: what was said.
        question: its answers are the right option's text and its letter.
    """
    said, right = answer.strip(), question.answers
    if said[:1] and said[0] in LETTERS:
        return float(said[0] in right)
    if said in right:
        return 1.0
    plain = re.sub("[\n\"'.,?!{} ]+", " ", said)
    for mark in ("answer is:", "answer:", "answer is", "option is"):
        if mark in plain:
            return _follows(plain, mark, right)
    # A word such as "AB" decides too, for no option: that is how it was published.
    return float(next((word for word in plain.split() if word in LETTERS), None) in right)


def faulty_function(answer: str, question: Question) -> float:
    """1.0 if the answer names the function with the error (InfiniteBench's Code.Debug).

    It begins with the right letter and "." or ":", or what follows the first of "answer is:", "is:", "answer:" begins
    with the right letter or the function's name. A letter alone is not enough, as published.

    Args:
        answer: what was said.
        question: its answers are the function's name and its letter.
    """
    said, right = answer.strip(), question.answers
    if any(said.startswith((f"{each}.", f"{each}:")) for each in right if each in LETTERS):
        return 1.0
    plain = re.sub("(?:[\n`'\"* -]|[Oo]ption)+", " ", said)
    for mark in ("answer is:", "is:", "answer:"):
        if mark in plain:
            return _follows(plain, mark, right)
    return 0.0


def correct_answer_is(answer: str, question: Question) -> float:
    """1.0 if the answer says "The correct answer is (X)", or without brackets, with the right letter (LongBench v2).

    Asterisks are left out; the bracketed form is looked for first; no other form counts, as published.
    """
    said = answer.replace("*", "")
    found = re.search(r"The correct answer is \(([A-D])\)", said) or re.search(r"The correct answer is ([A-D])", said)
    return float(found is not None and found[1] in question.answers)


def _follows(text: str, mark: str, right: tuple[str, ...]) -> float:
    """Whether a right answer follows the mark and one more character."""
    return float(text[text.index(mark) + len(mark) + 1 :].startswith(right))
