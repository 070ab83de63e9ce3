"""Claims about texts hidden between others: all there, in order, at their depths, each at a place of its own."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvx.eval.tasks.ruler.interleave import interleave

DEPTHS = st.lists(st.floats(0, 1, exclude_max=True), max_size=6)


@given(st.integers(0, 12), DEPTHS, st.sampled_from([" ", "\n", "\n\n"]), st.booleans())
def test_spans_hold_the_texts_and_what_is_left_is_the_filling(count, depths, joint, numbered):
    filling = [f"fill{number}" for number in range(count)]
    hidden = [(depth, f"hidden{number}") for number, depth in enumerate(depths)]

    def label(number: int) -> str:
        return f"{number}:" if numbered else ""

    text, spans, _ = interleave(filling, hidden, joint, label)
    assert [text[first:last] for first, last in spans] == [each for _, each in hidden]
    parts = text.split(joint) if text else []
    if numbered:
        assert [part.split(":")[0] for part in parts] == [str(number) for number in range(1, len(parts) + 1)]
        parts = [part.split(":")[1] for part in parts]
    assert [part for part in parts if part.startswith("fill")] == filling
    assert sorted(part for part in parts if part.startswith("hidden")) == sorted(each for _, each in hidden)


@given(st.integers(0, 30), DEPTHS)
def test_depths_keep_their_order_and_are_places_of_their_own(count, depths):
    hidden = [(depth, f"hidden{number}") for number, depth in enumerate(depths)]
    _, spans, found = interleave(["fill"] * count, hidden, " ")
    by_depth = sorted(range(len(depths)), key=lambda index: depths[index])
    assert [spans[index] for index in by_depth] == sorted(spans)
    assert all(0 <= depth <= 1 for depth in found)
    if len(depths) <= count + 1:
        assert len(set(found)) == len(depths)
    if len(depths) == 1 and count:
        # Of count + 1 places, the one whose share of [0, 1) the depth lies in.
        assert found[0] * count == pytest.approx(int(depths[0] * (count + 1)))


def test_one_text_goes_through_all_places_evenly():
    shares = [(index + 0.5) / 20 for index in range(20)]
    found = [interleave(["fill"] * 4, [(share, "x")], " ")[2][0] for share in shares]
    assert found == [depth for depth in (0, 0.25, 0.5, 0.75, 1) for _ in range(4)]
