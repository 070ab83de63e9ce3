"""Claims about successive halving: rungs, and who goes on."""

import pytest

from kvx.eval.search.halving import promoted, rungs


@pytest.mark.parametrize(
    ("first", "last", "counts"),
    [(4, 64, (4, 16, 64)), (4, 16, (4, 16)), (4, 4, (4,)), (8, 3, (3,)), (4, 20, (4, 20)), (4, 50, (4, 16, 50))],
)
def test_samples_grow_fourfold_and_the_last_rung_has_them_all(first, last, counts):
    assert rungs(first, last) == counts


def test_the_better_half_goes_on_judged_by_the_rungs_samples_alone():
    scores = {"good": [1.0, 1.0], "bad": [0.0, 0.0], "late": [0.0, 1.0, 1.0, 1.0], "few": [1.0]}
    nbytes = dict.fromkeys(scores, 10.0)
    assert promoted(scores, nbytes, 2, 20.0) == ["good", "late"]


def test_of_an_odd_number_the_middle_one_goes_on_too():
    scores = {name: [float(quality)] for quality, name in enumerate("abc")}
    assert promoted(scores, dict.fromkeys("abc", 10.0), 1, 20.0) == ["c", "b"]


def test_fewer_bytes_at_the_same_score_win():
    assert promoted({"a": [1.0], "b": [1.0]}, {"a": 8.0, "b": 4.0}, 1, 20.0) == ["b"]
