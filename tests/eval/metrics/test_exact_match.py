"""Claims about answers that must be right as a whole."""

from kvx.eval.metrics.exact_match import exact_match, verbatim
from kvx.eval.tasks.sample import Question


def test_verbatim_is_to_the_letter():
    asked = Question("", (" B",))
    assert [verbatim(each, asked) for each in (" B", "B", " b", "")] == [1, 0, 0, 0]


def test_exact_match_leaves_out_what_does_not_count():
    asked = Question("", ("Eiffel Tower", "tower of Eiffel"))
    assert [exact_match(each, asked) for each in ("the eiffel tower.", "Tower, of Eiffel", "tower", "")] == [1, 1, 0, 0]
