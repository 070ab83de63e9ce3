"""Answers that name a class, among all that the question allows: LongBench's few-shot classification."""

from kvx.eval.tasks.sample import Question


def class_score(answer: str, question: Question) -> float:
    """1 / classes that the answer names if the right one is among them, else 0; best over the right answers.

    A class is named where its text occurs. One whose name is part of the right one's ("location" in "Other location")
    is not counted. LongBench's scorer removes such classes from the list that it walks through and so misses the second
    of two neighbours; this one misses none, hence scores such an answer higher.

    Args:
        answer: what was said.
        question: its facts hold "classes", the names of all.
    """
    named = {each for each in question.facts["classes"] if each in answer}
    return max(_share(named, right) for right in question.answers)


def _share(named: set[str], right: str) -> float:
    if right not in named:
        return 0.0
    return 1 / sum(each == right or each not in right for each in named)
