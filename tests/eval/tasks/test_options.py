"""Claims about whole-number options: both ends are allowed, nothing beyond them, and only whole numbers."""

import pytest

from kvx.errors import BadInput
from kvx.eval.tasks.options import within


def test_both_ends_are_allowed():
    for value in (1, 2, 3):
        within("some", "items", value, 1, 3)
    within("some", "items", 10**9, 1)


@pytest.mark.parametrize("value", [0, 4, -1, 2.0, True, "2", None])
def test_what_lies_outside_or_is_no_whole_number_is_refused(value):
    with pytest.raises(BadInput, match=f"items={value!r} of task some; allowed: whole numbers, 1 to 3"):
        within("some", "items", value, 1, 3)


def test_an_open_end_is_said_as_such():
    with pytest.raises(BadInput, match="allowed: whole numbers, at least 1"):
        within("some", "items", 0, 1)
