"""Claims about class scores: shares among named classes, and classes whose names are parts of others."""

import pytest

from kvx.eval.metrics.classification import class_score
from kvx.eval.tasks.sample import Question

CLASSES = ("location", "Other location", "Other", "Person")


@pytest.mark.parametrize(
    ("answer", "right", "expected"),
    [
        ("Other location", "Other location", 1),  # "location" and "Other" are parts of it, both left out
        ("location", "location", 1),
        ("Person or location", "location", 1 / 2),
        ("Other location", "location", 1 / 3),  # the longer names are not parts of the right one
        ("Person", "location", 0),
        ("", "location", 0),
    ],
)
def test_class_score(answer, right, expected):
    assert class_score(answer, Question("", (right,), facts={"classes": CLASSES})) == expected
