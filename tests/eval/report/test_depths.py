"""Claims about heat maps: every sample is in the box of its depth and length, once, and few samples make few boxes."""

from dataclasses import replace

import pytest

from kvx.eval.report.depths import FEWEST, MOST, SAMPLES, depth_maps
from tests.eval.report import example


@pytest.fixture(scope="module")
def records():
    found = [each for each in example.records(20) if each.policy in ("full", "h2o(budget=0.5)")]
    return [each for each in found if each.cell.task == "passkey"]


def test_boxes_hold_every_sample_and_their_means_are_the_policys(records):
    maps = depth_maps(records)
    assert len(maps) == 4
    for found in maps:
        for length in example.LENGTHS:
            scores = [
                each.score for each in records
                if (each.cell.length, each.cell.mode, each.policy) == (length, found.mode, found.policy)
            ]  # fmt: skip
            boxes = [box for (of_length, _), box in found.boxes.items() if of_length == length]
            assert sum(box.count for box in boxes) == len(scores) == 20
            assert sum(box.mean * box.count for box in boxes) == pytest.approx(sum(scores))


def test_a_depth_is_in_its_range_and_both_ends_are_in_the_text(records):
    ends = [replace(records[0], index=index, depth=depth) for index, depth in enumerate((0.0, 0.34, 1.0))]
    (found,) = depth_maps(ends)
    assert found.bins == FEWEST and [place for _, place in found.boxes] == [0, 1, 2]


@pytest.mark.parametrize(("samples", "bins"), [(1, FEWEST), (20, 20 // SAMPLES), (50, MOST), (500, MOST)])
def test_boxes_are_as_many_as_samples_fill(records, samples, bins):
    (found,) = depth_maps([replace(records[0], index=index, depth=index / samples) for index in range(samples)])
    assert found.bins == bins


def test_a_sample_that_was_answered_twice_counts_once(records):
    (once,) = depth_maps(records[:20])
    (twice,) = depth_maps([*records[:20], *records[:20]])
    assert once == twice


def test_boxes_have_intervals_of_some_width_even_where_all_scores_are_equal(records):
    (found,) = depth_maps([replace(each, scores=(1.0,)) for each in records[:20]])
    assert all(box.low < 1.0 == box.mean == box.high for box in found.boxes.values())


def test_records_without_a_depth_have_no_map(records):
    assert depth_maps([replace(each, depth=None) for each in records]) == []
