"""Claims about passkeys along the way: what is asked, what counts as known, and that a run tells it from step 0 on."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvx.errors import BadInput
from kvx.loop import forward
from kvx.train.batch import Batch
from kvx.train.metrics import FILE, read
from kvx.train.recall import passkeys, prompts, recalled
from kvx.train.windows import held_out
from tests import tiny
from tests.eval.letters import Letters
from tests.train.tiny_runs import LENGTH, SMALL, Squares, mesh, text, trainer

PROSE = "\n\n".join(
    "The sentences of this paragraph say nothing at all of any number that may be hidden among them. " * 2 + word + "."
    for word in ("One", "Two", "Three", "Four")
)


def test_each_row_is_a_prompt_with_its_key_and_only_the_key_counts():
    batches = passkeys(Letters(), prompts(Letters(), PROSE, 512, 5), 4)
    assert [batch.tokens.shape[0] for batch in batches] == [4, 4]
    assert batches[0].tokens.shape == batches[1].tokens.shape
    rows = [row for batch in batches for row in zip(batch.tokens, batch.mask, strict=True)]
    keys = set()
    for tokens, mask in rows[:5]:
        (places,) = np.nonzero(mask)
        assert places[0] <= 512
        np.testing.assert_array_equal(places, np.arange(places[0], places[0] + 6))
        prompt, answer = Letters().decode(tokens[: places[0]]), Letters().decode(tokens[places])
        assert prompt.endswith("The pass key is")
        assert prompt.count(f"pass key is{answer}.") == 1
        keys.add(int(answer))
    assert len(keys) == 5
    assert not any(mask.any() for _, mask in rows[5:])


def test_a_length_that_no_question_fits_in_and_a_text_that_is_none_are_refused():
    with pytest.raises(BadInput, match="length=40 is too short for task=passkey"):
        prompts(Letters(), PROSE, 40, 2)
    with pytest.raises(BadInput, match="text='held-out text' has no running text to hide in"):
        prompts(Letters(), "1 2 3", 512, 2)


def test_a_row_is_known_if_every_token_that_counts_is_the_likeliest():
    """Answers are the model's own greedy continuation; one token of it is changed in two rows of six."""
    model = tiny.model(**SMALL)
    tokens = np.random.default_rng(0).integers(0, 96, (6, 20)).astype(np.int32)
    for place in range(14, 18):
        tokens[:, place] = np.argmax(forward(model, jnp.asarray(tokens))[:, place - 1], axis=-1)
    tokens[1, 14] = (tokens[1, 14] + 1) % 96
    tokens[4, 17] = (tokens[4, 17] + 1) % 96
    mask = np.zeros(tokens.shape, bool)
    mask[:, 14:18] = True
    mask[5] = False
    places = np.broadcast_to(np.arange(20, dtype=np.int32), tokens.shape)
    batch = Batch(tokens, np.ones_like(places), places, mask, packed=False)
    assert tuple(map(float, jax.jit(recalled)(model, batch))) == (pytest.approx(3 / 5), 5)
    nothing = replace(batch, mask=np.zeros_like(mask))
    assert tuple(map(float, jax.jit(recalled)(model, nothing))) == (0, 0)


def test_a_run_asks_student_and_teacher_before_its_first_step(tmp_path):
    """Batches of unequal numbers of rows that count weigh as their rows do."""
    run = trainer(tmp_path, 2, placement=mesh(1), minimised=Squares())
    first, second = held_out(text(seed=1)[: 16 * LENGTH], LENGTH, 8, 16 * LENGTH)
    likeliest = np.asarray(jnp.argmax(forward(run.teacher, jnp.asarray(first.tokens)), axis=-1))
    tokens, mask = first.tokens.copy(), np.zeros_like(first.mask)
    tokens[:, -1], mask[:, -1] = likeliest[:, -2], True
    sparse = np.zeros_like(second.mask)
    sparse[0, -1] = True
    wrong = second.tokens.copy()
    wrong[0, -1] = (np.argmax(forward(run.teacher, jnp.asarray(wrong))[0, -2]) + 1) % 96
    run.passkeys = [replace(first, tokens=tokens, mask=mask), replace(second, tokens=wrong, mask=sparse)]
    run.__post_init__()
    run.run()
    lines = [line for line in read(tmp_path / FILE) if "held_out" in line]
    assert [line["step"] for line in lines] == [0, 2]
    assert all(line["teacher_passkey"] == pytest.approx(8 / 9) for line in lines)
    assert all(0 <= line["passkey"] <= 1 for line in lines)
