"""Claims about passkey prompts: exact lengths, whole needles, depths, seeds, and what counts as found."""

import re

import numpy as np
import pytest

from kvx.errors import BadInput
from kvx.eval.passkey import passkeys, spread
from kvx.prose import prose
from tests.eval.letters import Letters


@pytest.mark.parametrize("length", [400, 1024, 4096])
def test_prompts_have_the_exact_length_and_an_intact_needle(length):
    for prompt in passkeys(Letters(), prose(), length, spread(3), seed=0):
        assert len(prompt.tokens) == length
        needle = Letters().decode(prompt.context[slice(*prompt.span)])
        assert needle == f" The pass key is {prompt.key}. Remember it. {prompt.key} is the pass key."
        assert Letters().decode(prompt.context).count(prompt.key) == 2


def test_depths_are_met_within_a_sentence_and_ends_are_ends():
    found = passkeys(Letters(), prose(), 4096, (0.0, 0.25, 0.5, 0.75, 1.0), seed=3)
    assert [prompt.depth for prompt in found[::4]] == [0.0, 1.0]
    np.testing.assert_allclose([prompt.depth for prompt in found], [0, 0.25, 0.5, 0.75, 1], atol=0.1)
    assert found[4].span[1] == len(found[4].context)
    for prompt in found[1:4]:
        assert re.search(r"[.!?\"')]$", Letters().decode(prompt.context[: prompt.span[0]]))


def test_a_seed_gives_the_same_prompts_and_another_gives_others():
    first, again, other = (passkeys(Letters(), prose(), 512, (0.5,), seed)[0] for seed in (1, 1, 2))
    assert first == again and first.key != other.key and first.context != other.context


def test_prompts_of_a_length_differ_in_key_and_prose():
    found = passkeys(Letters(), prose(), 512, spread(3), seed=0)
    assert len({prompt.key for prompt in found}) == len({prompt.context[-50:] for prompt in found}) == 3


@pytest.mark.parametrize(
    ("answer", "correct"),
    [(" 12345.", True), ("the key is 12345", True), (" 12,345", True), (" 1 2 3 4 5.", True), (" 12346", False),
     (" 123456", False), ("", False), (" 9 or 12345", False)],
)  # fmt: skip
def test_the_first_number_of_the_answer_must_be_the_key(answer, correct):
    prompt = passkeys(Letters(), prose(), 512, (0.5,), 0)[0]
    assert type(prompt)("12345", (), (), (0, 0), 0.0).correct(answer) is correct


def test_lengths_that_cannot_be_are_refused():
    with pytest.raises(BadInput, match="too short"):
        passkeys(Letters(), prose(), 100, (0.5,), 0)
    with pytest.raises(BadInput, match="longer than the prose"):
        passkeys(Letters(), prose(), 10**6, (0.5,), 0)
