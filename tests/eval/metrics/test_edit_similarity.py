"""Claims about the similarity of lines of code: matching blocks, whole percent, and which line counts."""

import pytest

from kvx.eval.metrics.edit_similarity import edit_similarity
from kvx.eval.tasks.sample import Question


@pytest.mark.parametrize(
    ("answer", "answers", "expected"),
    [
        ("return a + b", ("return a + b",), 1),
        ("abcd", ("bcde",), 0.75),  # 2 * 3 / 8
        ("abc", ("abcdef",), 0.67),  # 2 * 3 / 9, in whole percent
        ("\n\n# as asked\n```python\n// so\nx = 1\ny = 2", ("x = 1",), 1),  # the first line of code
        ("# nothing else", ("x = 1",), 0),
        ("\n", ("x = 1",), 0),
        ("xyz", ("abc", "xy"), 0.8),  # 2 * 2 / 5 of the better one
    ],
)
def test_edit_similarity(answer, answers, expected):
    assert edit_similarity(answer, Question("", answers)) == expected
