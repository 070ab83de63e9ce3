"""Claims about SnapKV (Li et al. 2024): what the window votes for, how votes are pooled, what is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvx import policies
from kvx.errors import BadInput
from kvx.evidence import Requests
from kvx.loop import attend
from kvx.parts.scores import pool
from tests.kvx.policies.direct import context, evidence, kept, softmax, tokens
from tests.tiny import model, prompts


def random_rows(heads, group, window, length, seed=0):
    """Causal probabilities of the last `window` queries."""
    logits = np.random.default_rng(seed).standard_normal((heads, group, window, length)) * 3
    late = np.arange(length) > np.arange(length - window, length)[:, None]
    return softmax(np.where(late, -np.inf, logits))


def choose(policy, rows):
    length = rows.shape[-1]
    return kept(policy, tokens(len(rows), length), evidence(length, rows=rows), context(length))


@pytest.mark.parametrize(("kernel", "pooling"), [(1, "mean"), (5, "mean"), (7, "max")])
@pytest.mark.parametrize("group", ["mean", "max"])
def test_kept_sets_equal_a_direct_computation(kernel, pooling, group):
    heads, window, length, budget = 2, 4, 40, 14
    rows = random_rows(heads, 3, window, length)
    votes = rows.mean(axis=2)[..., : length - window]
    votes = votes.mean(axis=1) if group == "mean" else votes.max(axis=1)
    half = kernel // 2
    padded = np.pad(votes, ((0, 0), (half, half)), constant_values=0 if pooling == "mean" else -np.inf)
    windows = np.lib.stride_tricks.sliding_window_view(padded, kernel, axis=1)
    pooled = windows.mean(axis=-1) if pooling == "mean" else windows.max(axis=-1)
    wanted = np.zeros((heads, length), bool)
    wanted[:, length - window :] = True
    for head in range(heads):
        wanted[head, np.argsort(-pooled[head].astype(np.float32), kind="stable")[: budget - window]] = True
    mask = choose(policies.snapkv(budget, window, kernel, pooling, group), rows)
    np.testing.assert_array_equal(mask, wanted)
    assert np.all(mask.sum(axis=1) == budget)


def test_a_window_of_one_without_pooling_ranks_like_tova_by_head():
    rows = random_rows(2, 3, 1, 30)
    snap, tova = choose(policies.snapkv(9, 1, 1), rows), choose(policies.tova(9, across="head", recent=1), rows)
    np.testing.assert_array_equal(snap, tova)


def test_a_budget_of_the_whole_prompt_keeps_it():
    assert choose(policies.snapkv(30, 4), random_rows(2, 2, 4, 30)).all()


def test_votes_are_the_last_rows_of_dense_attention_and_add_up_to_the_window():
    prompt, lengths = prompts(33, 21)
    window, block = 6, model().blocks[0]
    positions = jnp.where(jnp.arange(33) < lengths[:, None], jnp.arange(33, dtype=jnp.int32), -1)
    x = model().embed(jnp.asarray(prompt))
    _, new, seen = attend(block, x, positions, requests=Requests(rows=window))
    q, _, _ = block.project(x)
    for row, length in enumerate(lengths):
        queries = np.asarray(block.rotary(q[row], jnp.arange(33)[:, None]))[length - window : length]
        queries = queries.transpose(1, 0, 2).reshape(2, 2, window, -1)
        logits = np.einsum("grtd,gsd->grts", queries, np.asarray(new.keys[row])[:, :length]) * block.spec.scale
        late = np.arange(length) > np.arange(length - window, length)[:, None]
        dense = softmax(np.where(late, -np.inf, logits))
        found = np.asarray(seen.rows[row])
        np.testing.assert_allclose(found[..., :length], dense, atol=1e-6)
        assert np.all(found[..., length:] == 0)  # padding gets no vote
        np.testing.assert_allclose(found.sum(axis=(-1, -2)), window, rtol=1e-5)


def test_votes_have_no_derivative_and_stand_beside_one():
    block = model().blocks[0]
    x, positions = model().embed(jnp.arange(12, dtype=jnp.int32)[None]), jnp.arange(12, dtype=jnp.int32)[None]

    def loss(x, weight):
        out, _, seen = attend(block, x, positions, requests=Requests(rows=4))
        return jnp.sum(out**2) + (weight * jnp.sum(seen.rows**2) if weight else 0.0), seen.rows

    plain = jax.grad(lambda x: jnp.sum(attend(block, x, positions)[0] ** 2))(x)
    # Two programs may round a product differently.
    np.testing.assert_allclose(jax.grad(loss, has_aux=True)(x, 0)[0], plain, atol=1e-5)
    with pytest.raises(ValueError, match="rows are differentiated, but only output and log-sum-exp"):
        jax.grad(loss, has_aux=True)(x, 1.0)


@pytest.mark.parametrize(
    ("pooling", "pooled"),
    [("max", [1, 1, 1, 0.9, 0.9, 0.9, 0]), ("mean", [1 / 3, 1 / 3, 1 / 3, 0.3, 0.3, 0.3, 0])],
)
def test_neighbours_of_a_vote_are_pooled_in(pooling, pooled):
    votes = jnp.asarray([[[0, 1, 0, 0, 0.9, 0, 0]]], jnp.float32)
    np.testing.assert_allclose(pool(votes, 3, pooling)[0, 0], pooled, atol=1e-6)


def test_pooling_brings_whole_neighbourhoods_and_its_ties_keep_the_lower():
    rows = np.array([0, 1, 0, 0, 0.9, 0, 0, 0.0])[None, None, None]
    for pooling in ("max", "mean"):
        mask = choose(policies.snapkv(4, 1, 3, pooling), rows)
        np.testing.assert_array_equal(np.flatnonzero(mask), [0, 1, 2, 7])
    np.testing.assert_array_equal(np.flatnonzero(choose(policies.snapkv(4, 1, 1), rows)), [0, 1, 4, 7])


def test_votes_inside_the_window_do_not_leak_into_the_prompt():
    rows = np.array([0.2, 0.1, 0.0, 0.0, 0.7])[None, None, None]
    np.testing.assert_array_equal(np.flatnonzero(choose(policies.snapkv(3, 1, 3), rows)), [0, 1, 4])


@pytest.mark.parametrize(
    ("arguments", "word"),
    [({"kernel": 4}, "odd"), ({"window": 0}, "window"), ({"pooling": "sum"}, "pooling"), ({"budget": 63}, "64")],
)
def test_impossible_settings_are_refused(arguments, word):
    with pytest.raises(BadInput, match=word):
        policies.snapkv(**{"budget": 128, **arguments})
