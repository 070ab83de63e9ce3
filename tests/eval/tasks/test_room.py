"""Claims about an answer's room: what it takes, a quarter more, and at least a few words."""

import pytest

from kvx.eval.prompts import Frame
from kvx.eval.tasks.room import STEP, room
from kvx.eval.tasks.source import Source
from kvx.prose import Prose
from tests.eval.letters import Letters


@pytest.mark.parametrize(("letters", "tokens"), [(0, 8), (1, 16), (6, 16), (7, 16), (8, 24), (100, 136)])
def test_room_is_a_quarter_and_a_step_more_rounded_up(letters, tokens):
    """100 letters: 100 + 25 + 8 = 133, rounded up to 136."""
    assert room(Source(Letters(), Prose("", ""), Frame()), "x" * letters) == tokens and tokens % STEP == 0
