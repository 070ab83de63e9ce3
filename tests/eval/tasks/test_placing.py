"""Claims about placing: depths fill an even grid, lines stand where they were told, spans cut out what was marked."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvx.eval.tasks.placing import even_depths, interleave, joined


@given(count=st.integers(1, 12), parts=st.integers(1, 12), seed=st.integers(0, 99))
def test_depths_of_all_samples_are_an_even_grid(count, parts, seed):
    random = np.random.default_rng(seed)
    found = np.sort([depth for index in range(count) for depth in even_depths(random, index, count, parts)])
    np.testing.assert_allclose(found, (np.arange(count * parts) + 0.5) / (count * parts), atol=1e-12)


def test_each_thing_is_in_every_stretch_alike():
    random = np.random.default_rng(0)
    first = [even_depths(random, 0, 1, 4)[0] for _ in range(4000)]
    counts = np.histogram(first, bins=4, range=(0, 1))[0]
    assert np.all(np.abs(counts - 1000) < 5 * np.sqrt(4000 * 0.25 * 0.75))  # five standard deviations


@given(parts=st.integers(1, 9), more=st.integers(0, 40), count=st.integers(1, 9), seed=st.integers(0, 99))
def test_lines_stand_at_their_depths_and_the_others_keep_their_order(parts, more, count, seed):
    depths = even_depths(np.random.default_rng(seed), seed % count, count, parts)
    asked, others = [f"a{index}" for index in range(parts)], [f"o{index}" for index in range(more)]
    lines, at = interleave(asked, others, depths)
    assert [lines[place] for place in at] == asked
    assert [line for line in lines if line.startswith("o")] == others
    assert np.all(np.abs(np.asarray(at) / len(lines) - depths) <= 1 / len(lines))


@given(lines=st.lists(st.text("ab, ", max_size=5), min_size=1, max_size=9), data=st.data())
def test_spans_cut_out_the_marked_lines(lines, data):
    marked = data.draw(st.lists(st.integers(0, len(lines) - 1), max_size=4))
    text, spans = joined("before ", lines, ", ", " after", marked)
    assert text == "before " + ", ".join(lines) + " after"
    assert [text[first:last] for first, last in spans] == [lines[at] for at in marked]


def test_the_last_depth_is_the_last_line():
    assert interleave(["a"], ["x", "y"], [1.0]) == (["x", "y", "a"], [2])
    assert interleave(["a"], ["x", "y"], [0.0]) == (["a", "x", "y"], [0])
    assert interleave(["a", "b"], ["x", "y"], [0.75, 0.25]) == (["x", "b", "y", "a"], [3, 1])


def test_nothing_marked_has_no_spans():
    assert joined("", ["one"], "\n", ".", ()) == ("one.", ())


@pytest.mark.parametrize("index", [0, 3])
def test_one_thing_has_the_depth_of_its_sample(index):
    assert even_depths(np.random.default_rng(0), index, 4, 1) == [(index + 0.5) / 4]
