"""Claims about ranking by quality and bytes: frontiers first, by the area that only a point covers."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from kvx.eval.search.ranking import Point, frontier, ranked

POINTS = st.lists(
    st.tuples(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), st.sampled_from([1.0, 2.0, 3.0, 4.0, 8.0])), max_size=12
).map(lambda pairs: [Point(f"p{index:02}", *pair) for index, pair in enumerate(pairs)])


def beats(one, other):
    return one.quality >= other.quality and one.nbytes <= other.nbytes and one != other


@given(POINTS)
def test_the_frontier_is_what_nothing_beats_and_it_beats_or_equals_the_rest(points):
    edge = frontier(points)
    for point in points:
        covered = any(each.quality >= point.quality and each.nbytes <= point.nbytes for each in edge)
        assert covered and (point not in edge or not any(beats(other, point) for other in edge))
    assert edge == sorted(edge, key=lambda point: point.nbytes)
    assert all(one.quality < other.quality for one, other in pairwise(edge))


@given(POINTS)
def test_ranking_is_a_permutation_in_which_no_strictly_better_point_comes_later(points):
    order = ranked(points, limit=8.0)
    assert sorted(order, key=lambda point: point.name) == points
    for at, point in enumerate(order):
        for later in order[at + 1 :]:
            assert not (later.quality > point.quality and later.nbytes < point.nbytes)


@given(POINTS, st.randoms())
def test_the_order_of_the_points_does_not_matter(points, random):
    shuffled = list(points)
    random.shuffle(shuffled)
    assert ranked(points, 8.0) == ranked(shuffled, 8.0)


def test_a_point_that_answers_nothing_comes_last_though_nothing_is_smaller():
    points = [Point("nothing", 0.0, 1.0), Point("good", 0.9, 500.0), Point("worse", 0.8, 600.0)]
    assert [point.name for point in ranked(points, 1000.0)] == ["good", "worse", "nothing"]


def test_areas_worked_out_by_hand_decide_within_a_frontier():
    # Over log2 of bytes, with the corner at 2 x 16 = 2^5 and the worst quality, 0, below:
    # a (4, 2^2): (3 - 2)(4 - 0) = 4;  b (5, 2^3): (4 - 3)(5 - 4) = 1;  c (10, 2^4): (5 - 4)(10 - 5) = 5.
    points = [Point("a", 4.0, 4.0), Point("b", 5.0, 8.0), Point("c", 10.0, 16.0), Point("z", 0.0, 16.0)]
    assert [point.name for point in ranked(points, 16.0)] == ["c", "a", "b", "z"]


def test_no_points_have_no_order():
    assert ranked([], 1.0) == [] and frontier([]) == []
