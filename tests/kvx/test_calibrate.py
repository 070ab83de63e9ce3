"""Claims about calibration and Q-Filters (Godey et al. 2025): directions, signs, groups, and what they keep."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvx
from kvx.calibrate import calibrate
from kvx.context import Activations
from kvx.errors import BadInput
from kvx.loop import project
from kvx.parts.scores import Projection, query_directions
from kvx.policies import full, q_filters, snapkv
from tests.kvx.policies.direct import attention
from tests.tiny import model, prompts


def batches(count=2, length=48):
    return [prompts(length, length, seed=seed)[0] for seed in range(count)]


def with_directions(policy, directions):
    (stage,) = policy.stages
    score = replace(stage.score, directions=jnp.asarray(directions, jnp.float32))
    return replace(policy, stages=(replace(stage, score=score),))


def directions(policy):
    return policy.stages[0].score.directions


def queries(mean=5.0, shape=(3, 200), dim=16, seed=0):
    random = np.random.default_rng(seed)
    axis = random.standard_normal(dim)
    axis /= np.linalg.norm(axis)
    return jnp.asarray(mean * axis + random.standard_normal((*shape, dim)), jnp.float32), axis


def test_directions_follow_the_mean_of_the_queries():
    sample, axis = queries()
    cosine = np.asarray(query_directions(sample)) @ axis
    assert np.all(cosine > 0.98)


def test_negated_queries_negate_the_direction():
    sample, _ = queries()
    np.testing.assert_allclose(query_directions(-sample), -query_directions(sample), atol=1e-5)


def test_the_sign_of_a_singular_vector_does_not_matter():
    # Whatever sign a decomposition returns, the rule decides; a peer that starts from -v must end in the same place.
    sample, _ = queries(mean=1.0, shape=(200,))
    _, _, right = np.linalg.svd(np.asarray(sample), full_matrices=False)
    for start in (right[0], -right[0]):
        positive = np.mean(np.asarray(sample) @ start > 0) > 0.5
        np.testing.assert_allclose(query_directions(sample), start if positive else -start, atol=1e-4)


def test_the_second_moment_gives_the_first_right_singular_vector():
    sample, _ = queries(mean=0.7, shape=(4, 300))
    for head, found in zip(sample, query_directions(sample), strict=True):
        right = np.linalg.svd(np.asarray(head, np.float64))[2][0]
        assert abs(right @ np.asarray(found, np.float64)) > 1 - 1e-5
        assert np.mean(np.asarray(head @ found) > 0) > 0.5


def test_a_tie_of_votes_is_decided_by_the_sum():
    sample = jnp.asarray([[3.0, 0.0], [-1.0, 0.0]])
    np.testing.assert_allclose(query_directions(sample), [1.0, 0.0], atol=1e-6)
    np.testing.assert_allclose(query_directions(-sample), [-1.0, 0.0], atol=1e-6)


def test_filters_are_the_plain_mean_over_the_query_heads_of_a_group():
    sample, _ = queries(shape=(2, 3, 100))
    found = Projection().digest(Activations(sample, sample[:, 0], sample[:, 0], attention(6, 2, 16)))
    np.testing.assert_allclose(found, jnp.mean(query_directions(sample), axis=1), atol=1e-6)
    opposite = jnp.stack([sample[0, 0], -sample[0, 0]])[None]
    found = Projection().digest(Activations(opposite, sample[:1, 0], sample[:1, 0], attention(2, 1, 16)))
    np.testing.assert_allclose(found, 0, atol=1e-5)


def test_with_one_query_head_a_group_the_filter_is_its_direction():
    sample, _ = queries(shape=(2, 1, 100))
    found = Projection().digest(Activations(sample, sample[:, 0], sample[:, 0], attention(2, 2, 16)))
    np.testing.assert_allclose(jnp.linalg.norm(found, axis=-1), 1.0, atol=1e-5)


def test_calibration_equals_a_dense_oracle_on_the_first_layer():
    one = model()
    texts = batches()
    policy = calibrate(q_filters(budget=64), one, texts)
    assert directions(policy).shape == (4, 2, 32) and policy.text == "q_filters(budget=64)"
    block = one.blocks[0]
    rows = []
    for text in texts:
        x = one.embed(jnp.asarray(text))
        rotated = project(block, x, jnp.broadcast_to(jnp.arange(text.shape[1]), text.shape))[0].rotated
        rows.append(np.asarray(jnp.moveaxis(rotated, 0, 2)).reshape(2, 2, -1, 32))
    sample = np.concatenate(rows, axis=2).astype(np.float64)
    for group in range(2):
        heads = []
        for head in range(2):
            right = np.linalg.svd(sample[group, head])[2][0]
            heads.append(right if np.sum(np.sign(sample[group, head] @ right)) > 0 else -right)
        np.testing.assert_allclose(directions(policy)[0, group], np.mean(heads, axis=0), atol=2e-3)


def test_the_sample_is_bounded_and_seeded():
    one, texts = model(), batches()
    first = directions(calibrate(q_filters(budget=64), one, texts, rows=50))
    again = directions(calibrate(q_filters(budget=64), one, texts, rows=50))
    other = directions(calibrate(q_filters(budget=64), one, texts, rows=50, seed=1))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)


def test_policies_that_learn_nothing_pass_unchanged():
    policy = snapkv(budget=128)
    assert calibrate(policy, model(), []) is policy
    assert not any(stage.learns for stage in policy.stages)


def test_calibration_inside_a_chain_fills_only_the_stage_that_learns():
    policy = kvx.chain(q_filters(budget=96, every_step=False), snapkv(budget=80))
    found = calibrate(policy, model(), batches(1))
    assert directions(found) is not None and found.stages[1] is policy.stages[1]
    _, cache = kvx.prefill(model(), prompts(120)[0], found, max_new_tokens=4)
    assert int(jnp.sum(cache.layers[0].positions()[0, 0] >= 0)) == 80


def test_kept_keys_are_the_top_logits_if_every_query_points_one_way():
    # The rank-1 oracle: with q = c u for c > 0, the filter's order of keys is that of every query's logits.
    one, tokens = model(), prompts(100)[0]
    block = one.blocks[0]
    u = np.random.default_rng(0).standard_normal((2, 32))
    policy = with_directions(q_filters(budget=20, window=0, every_step=False), np.broadcast_to(u, (4, 2, 32)))
    _, cache = kvx.prefill(one, tokens, policy, max_new_tokens=4)
    keys = project(block, one.embed(jnp.asarray(tokens)), jnp.arange(100)[None])[1].rotated_keys[0]
    for group in range(2):
        logits = np.asarray(keys[group]) @ (3.0 * u[group])
        kept = np.asarray(cache.layers[0].positions()[0, group])
        assert set(kept[kept >= 0]) == set(np.argsort(-logits)[:20])


def test_kept_sets_do_not_change_with_a_positive_scale_and_windows_stay():
    one, tokens = model(), prompts(100)[0]
    u = np.random.default_rng(1).standard_normal((4, 2, 32))
    kept = []
    for scale in (1.0, 7.5):
        policy = with_directions(q_filters(budget=24, window=8), scale * u)
        _, cache = kvx.prefill(one, tokens, policy, max_new_tokens=4)
        kept.append([np.sort(np.asarray(layer.positions()), axis=-1) for layer in cache.layers])
        assert all(set(range(92, 100)) <= set(rows[0, 0].tolist()) for rows in kept[-1])
    jax.tree.map(np.testing.assert_array_equal, *kept)


def test_a_budget_that_holds_everything_changes_nothing():
    one, tokens = model(), prompts(60)[0]
    policy = calibrate(q_filters(budget=128), one, batches(1))
    expected = kvx.generate(one, tokens, policy=full(), max_new_tokens=12)
    np.testing.assert_array_equal(kvx.generate(one, tokens, policy=policy, max_new_tokens=12).tokens, expected.tokens)


def test_uncalibrated_or_foreign_directions_are_refused_before_any_work():
    tokens = prompts(40)[0]
    with pytest.raises(BadInput, match=r"q_filters is not calibrated.*kvx\.calibrate"):
        kvx.prefill(model(), tokens, q_filters(budget=64))
    foreign = with_directions(q_filters(budget=64), np.ones((4, 3, 32)))
    with pytest.raises(BadInput, match=r"shape \(4, 3, 32\); allowed: \(4, 2, 32\)"):
        kvx.prefill(model(), tokens, foreign)


def test_calibration_refuses_no_batches_and_foreign_tokens():
    with pytest.raises(BadInput, match="batches is empty"):
        calibrate(q_filters(budget=64), model(), [])
    with pytest.raises(BadInput, match="vocabulary"):
        calibrate(q_filters(budget=64), model(), [np.full((1, 8), 97)])
