"""Claims about chosen options: which rule of a benchmark's parser decides."""

import pytest

from kvx.eval.metrics.choice import choice, correct_answer_is, faulty_function
from kvx.eval.tasks.sample import Question

RIGHT = Question("", ("The red door", "B"))


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("B", 1),
        (" B. The red door", 1),
        ("C. The red door", 0),  # the first letter decides
        ("A man, so B", 0),  # even where it is a word
        ("The red door", 1),
        ("I think the answer is: B", 1),
        ("my answer is The red door", 1),
        ("The answer is A, not B", 0),
        ("the answer is", 0),
        ("it must be B or C", 1),  # the first letter that stands alone
        ("it must be C or B", 0),
        ("it is bold", 0),
        ("", 0),
    ],
)
def test_choice(answer, expected):
    assert choice(answer, RIGHT) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("B. parse", 1),
        ("B: parse", 1),
        ("B", 0),  # as published
        ("The correct option is: B", 1),
        ("the answer is: `parse`", 1),
        ("answer: C", 0),
        ("parse", 0),
        ("", 0),
    ],
)
def test_faulty_function(answer, expected):
    assert faulty_function(answer, Question("", ("parse", "B"))) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The correct answer is (B).", 1),
        ("**The correct answer is B**", 1),
        ("The correct answer is A, or rather: The correct answer is (B)", 1),  # brackets are looked for first
        ("The correct answer is (C)", 0),
        ("the correct answer is (B)", 0),
        ("B", 0),
        ("", 0),
    ],
)
def test_correct_answer_is(answer, expected):
    assert correct_answer_is(answer, Question("", ("B",))) == expected
