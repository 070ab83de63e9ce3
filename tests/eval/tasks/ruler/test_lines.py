"""Claims about haystacks of lines: whole lines, one last line of clauses, needles as lines of their own."""

import pytest

from kvx.eval.tasks.ruler.lines import CLAUSES, NOISE, Lines
from tests.eval.tasks.ruler.pieces import Pieces, source


def test_the_noise_is_five_clauses():
    assert len(CLAUSES) == 5 and " ".join(CLAUSES) == NOISE
    assert not any(letter.isdigit() for letter in NOISE)


@pytest.mark.parametrize("count", [0, 1, 4, 5, 23])
def test_noise_is_lines_of_five_clauses_and_a_part_of_one(count):
    text, spans, _ = Lines.noise().hide(count, [])
    whole, rest = divmod(count, 5)
    assert text.split("\n")[:whole] == [NOISE] * whole or not count
    assert text.count(".") == count and not spans
    assert not rest or NOISE.startswith(text.split("\n")[-1])


def test_needles_are_lines_of_their_own():
    text, spans, depths = Lines.noise().hide(23, [(0.9, "last."), (0.0, "first.")])
    assert [text[first:last] for first, last in spans] == ["last.", "first."]
    assert text.split("\n")[0] == "first." and "last." in text.split("\n")
    assert depths[1] == 0 and depths[0] >= 0.8


def test_a_line_counts_for_as_many_clauses_as_take_its_place():
    noise = len(Pieces().encode(NOISE, add_special=False)) + 0.0
    for words in (1, 10, 60):
        line = " ".join(["tree"] * words)
        hay = Lines.of(source(), lambda number, line=line: line)
        assert abs(hay.clauses * noise / 5 - words) <= noise / 5 + 1 or hay.clauses == 1
        sizes = [len(Pieces().encode(hay.hide(count, [])[0])) for count in range(3 * hay.clauses)]
        assert sizes == sorted(sizes)
