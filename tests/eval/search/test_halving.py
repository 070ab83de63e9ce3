"""Claims about successive halving: rungs, who goes on, and the order in which samples are spent."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvx.eval.search.halving import promoted, rungs, spread


@pytest.mark.parametrize(
    ("first", "last", "counts"),
    [(4, 64, (4, 16, 64)), (4, 16, (4, 16)), (4, 4, (4,)), (8, 3, (3,)), (4, 20, (4, 20)), (4, 50, (4, 16, 50))],
)
def test_samples_grow_fourfold_and_the_last_rung_has_them_all(first, last, counts):
    assert rungs(first, last) == counts


@given(st.integers(1, 300))
def test_every_sample_is_spent_once_and_any_first_few_cover_the_range(count):
    order = spread(count)
    assert sorted(order) == list(range(count))
    power = 1 << (count.bit_length() - 1)
    if power == count:
        for taken in (2**bits for bits in range(count.bit_length())):
            parts = {index * taken // count for index in order[:taken]}
            assert parts == set(range(taken))


def test_the_first_four_of_64_lie_a_quarter_apart():
    assert spread(64)[:4] == [0, 32, 16, 48]


def test_the_better_half_goes_on_judged_by_the_rungs_samples_alone():
    scores = {"good": [1.0, 1.0], "bad": [0.0, 0.0], "late": [0.0, 1.0, 1.0, 1.0], "few": [1.0]}
    nbytes = dict.fromkeys(scores, 10.0)
    assert promoted(scores, nbytes, 2, 20.0) == ["good", "late"]


def test_of_an_odd_number_the_middle_one_goes_on_too():
    scores = {name: [float(quality)] for quality, name in enumerate("abc")}
    assert promoted(scores, dict.fromkeys("abc", 10.0), 1, 20.0) == ["c", "b"]


def test_fewer_bytes_at_the_same_score_win():
    assert promoted({"a": [1.0], "b": [1.0]}, {"a": 8.0, "b": 4.0}, 1, 20.0) == ["b"]
