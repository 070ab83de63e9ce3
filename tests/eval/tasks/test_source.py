"""Claims about where samples have their answers: every part of the text once, and any first samples all over it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvx.eval.tasks.source import part, spread


@given(st.integers(1, 300))
def test_every_sample_has_a_part_of_its_own(count):
    assert sorted(part(index, count) for index in range(count)) == list(range(count))
    assert sum(spread(index, count) for index in range(count)) == pytest.approx(count / 2)


@pytest.mark.parametrize("count", [16, 50, 200])
def test_the_first_samples_lie_all_over_the_text(count):
    for first in (4, 8, 16):
        depths = sorted(spread(index, count) for index in range(first))
        gaps = [after - before for before, after in zip([0.0, *depths], [*depths, 1.0], strict=True)]
        assert max(gaps) <= 2.1 / first
