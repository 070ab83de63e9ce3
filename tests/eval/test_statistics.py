"""Claims about intervals: textbook values, and what each is bounded by."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvx.eval.statistics import Interval

BITS = st.lists(st.booleans(), min_size=1, max_size=40)


def test_intervals_of_means_are_students():
    """Of 1, 2, 3: mean 2, standard error 1 / sqrt(3), t of two degrees of freedom 4.3027."""
    found = Interval.of(np.asarray([1.0, 2.0, 3.0]))
    assert (found.mean, found.high - 2) == (2.0, pytest.approx(4.302653 / 3**0.5, rel=1e-6))
    assert Interval.of(np.asarray([1.5])) == Interval(1.5, 1.5, 1.5)


def test_wilsons_interval_of_nine_in_ten():
    """Worked by hand: z = 1.959964; middle (0.9 + z^2 / 20) / (1 + z^2 / 10), half as in Wilson's formula."""
    z = 1.959963984540054
    found = Interval.wilson(np.asarray([1.0] * 9 + [0.0]))
    middle, scale = 0.9 + z * z / 20, 1 + z * z / 10
    half = z * (0.9 * 0.1 / 10 + z * z / 400) ** 0.5
    assert (found.low, found.high) == pytest.approx(((middle - half) / scale, (middle + half) / scale))
    assert found.low == pytest.approx(0.5958, abs=1e-4) and found.high == pytest.approx(0.9821, abs=1e-4)


@given(BITS)
def test_wilsons_interval_holds_the_share_within_0_and_1_and_is_never_a_point(bits):
    found = Interval.wilson(np.asarray(bits, float))
    assert 0 <= found.low <= found.mean <= found.high <= 1 and found.high > found.low
    assert found.count == len(bits)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_paired_shares_are_antisymmetric_and_hold_the_difference(pairs):
    one, other = np.asarray(pairs, float).T
    found, back = Interval.paired_shares(one, other), Interval.paired_shares(other, one)
    assert found.mean == pytest.approx(np.mean(one) - np.mean(other)) and found.low < found.high
    assert (found.low, found.high) == (pytest.approx(-back.high), pytest.approx(-back.low))
    assert -1 <= found.low <= found.mean <= found.high <= 1


def test_the_bootstrap_is_seeded_lies_in_the_range_and_comes_near_the_normal_interval():
    values = np.random.default_rng(0).uniform(size=400)
    found = Interval.bootstrap(values)
    assert found == Interval.bootstrap(values) and values.min() < found.low < found.mean < found.high < values.max()
    half = 1.96 * values.std() / 20
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.05)
