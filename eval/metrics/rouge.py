"""ROUGE-L of summaries in the two variants that benchmarks report: by sentences at full stops, and by lines.

Both match each sentence of the reference with each of the candidate by a longest common subsequence and take the union
(Lin 2004, section 3.2). They differ in what a word is, in what is counted, and in which of several longest
subsequences is taken: the last matters, since the union depends on it. F = 2 P R / (P + R) with P = hits / n and
R = hits / m, which is 2 hits / (m + n).
"""

import re
from collections import Counter
from collections.abc import Sequence

from kvx.eval.metrics.segmentation import segmented
from kvx.eval.tasks.sample import Question


def rouge_l(answer: str, question: Question) -> float:
    """ROUGE-L as the package `rouge` 1.0.1 computes it, best over the right answers (LongBench).

    A sentence ends at ".", wherever it stands; words are what blanks separate, and are counted once however often they
    occur: hits, m and n are sizes of sets. The package adds 1e-8 to P + R, which is left out here. It also fails on two
    sentences of about a thousand words together, which LongBench's scorer counts as 0; this one does not fail.
    """
    return max(_by_stops(answer, right) for right in question.answers)


def rouge_l_zh(answer: str, question: Question) -> float:
    """`rouge_l` of segmented Chinese text (LongBench).

    Raises:
        BadInput: the package jieba is missing.
    """
    said = " ".join(segmented(answer))
    return max(_by_stops(said, " ".join(segmented(right))) for right in question.answers)


def rouge_lsum(answer: str, question: Question) -> float:
    """ROUGE-Lsum as the package `rouge-score` 0.1.2 computes it, best over the right answers (InfiniteBench, SCBench).

    A sentence is a line; words are runs of a to z and 0 to 9 in lower case, not stemmed; a word is a hit at most as
    often as it occurs on either side.
    """
    return max(_by_lines(answer, right) for right in question.answers)


def _by_stops(answer: str, right: str) -> float:
    said, expected = _sentences(answer), _sentences(right)
    if not said or not expected:
        return 0.0
    hits = {
        reference[at]
        for reference in expected
        for candidate in said
        for at in _common(reference, candidate, drop_candidate=True)
    }
    total = len({word for each in said for word in each}) + len({word for each in expected for word in each})
    return 2 * len(hits) / total


def _sentences(text: str) -> list[list[str]]:
    # A piece of blanks alone is a sentence of one empty word: that is how the package counts.
    return [" ".join(piece.split()).split(" ") for piece in text.split(".") if piece]


def _by_lines(answer: str, right: str) -> float:
    said, expected = ([re.findall("[a-z0-9]+", line) for line in text.lower().split("\n")] for text in (answer, right))
    left_said, left_expected = (Counter(word for line in lines for word in line) for lines in (said, expected))
    total, hits = left_said.total() + left_expected.total(), 0
    for reference in expected:
        found = {at for candidate in said for at in _common(reference, candidate, drop_candidate=False)}
        for at in sorted(found):
            word = reference[at]
            if left_said[word] > 0 and left_expected[word] > 0:
                hits += 1
                left_said[word] -= 1
                left_expected[word] -= 1
    return 2 * hits / total if hits else 0.0


def _common(reference: Sequence[str], candidate: Sequence[str], drop_candidate: bool) -> list[int]:
    """Places in the reference of one longest common subsequence, the last first.

    Args:
        drop_candidate: read back from the ends, where either side's last word could go: whether the candidate's does.
    """
    lengths = [[0] * (len(candidate) + 1)]
    for word in reference:
        above, row = lengths[-1], [0]
        for at, other in enumerate(candidate):
            row.append(above[at] + 1 if word == other else max(above[at + 1], row[at]))
        lengths.append(row)
    found, i, j = [], len(reference), len(candidate)
    while i and j:
        without_reference, without_candidate = lengths[i - 1][j], lengths[i][j - 1]
        if reference[i - 1] == candidate[j - 1]:
            i, j = i - 1, j - 1
            found.append(i)
        elif without_candidate > without_reference or (drop_candidate and without_candidate == without_reference):
            j -= 1
        else:
            i -= 1
    return found
