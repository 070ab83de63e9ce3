"""Overlap of two bags of words or characters, F1: how question answering is scored."""

from collections import Counter
from collections.abc import Sequence

from kvx.eval.metrics.normalise import normalised, normalised_zh
from kvx.eval.metrics.segmentation import segmented
from kvx.eval.tasks.sample import Question


def token_f1(answer: str, question: Question) -> float:
    """F1 of normalised words, best over the right answers (SQuAD's, as LongBench and InfiniteBench use it)."""
    said = normalised(answer).split()
    return max(_f1(said, normalised(right).split()) for right in question.answers)


def token_f1_zh(answer: str, question: Question) -> float:
    """F1 of segmented, normalised Chinese words, best over the right answers (LongBench).

    Raises:
        BadInput: the package jieba is missing.
    """
    said = _words(answer)
    return max(_f1(said, _words(right)) for right in question.answers)


def character_f1(answer: str, question: Question) -> float:
    """F1 of normalised characters, best over the right answers (InfiniteBench's and SCBench's Chinese questions)."""
    said = normalised_zh(answer)
    return max(_f1(said, normalised_zh(right)) for right in question.answers)


def _f1(said: Sequence[str], right: Sequence[str]) -> float:
    """2 P R / (P + R) with P = same / said and R = same / right, which is 2 same / (said + right)."""
    same = (Counter(said) & Counter(right)).total()
    return 2 * same / (len(said) + len(right)) if same else 0.0


def _words(text: str) -> list[str]:
    return [word for each in segmented(text) if (word := normalised_zh(each))]
