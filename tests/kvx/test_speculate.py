"""Claims about speculative generation: the target's tokens when greedy, the target's law when sampled, at any batch."""

from functools import cache as once
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvx
from kvx import Drafter, speculate
from kvx.drafters import Draws
from kvx.policies import full, h2o, kivi, quantspec, quest, snapkv, streaming_llm
from kvx.sampling import GREEDY, law
from kvx.speculate import _speculate
from tests import tiny
from tests.kvx.test_compilation import copies, large_shapes

LENGTHS = (90, 41)
NEW = 50


def target():
    return tiny.model(num_hidden_layers=2)


def other():
    """A drafter that knows nothing of the target but its vocabulary."""
    return tiny.model(num_hidden_layers=1, hidden_size=32, num_key_value_heads=1)


def nested(gamma: int = 5, bits: int = 2):
    """Two bits, so that drafts often fall."""
    return quantspec(bits, group=16, gamma=gamma)


def run(how, policy, rows=slice(None), lengths=LENGTHS, **arguments):
    tokens, lengths = tiny.prompts(*lengths)
    arguments = {"max_new_tokens": NEW, **arguments}
    return how(target(), tokens[rows], policy=policy, lengths=lengths[rows], **arguments)


@once
def plain(policy):
    return run(kvx.generate, policy)


@pytest.mark.sampled
@pytest.mark.parametrize("gamma", [0, 5, *(pytest.param(gamma, marks=pytest.mark.slow) for gamma in (1, 3, 12))])
def test_greedy_tokens_are_those_of_the_target_alone(gamma):
    """The same codes at every position, on whichever side of a block's boundary a round ends."""
    drafted, alone = run(speculate, nested(gamma), gamma=gamma), plain(nested(gamma))
    assert np.array_equal(drafted.tokens, alone.tokens) and np.array_equal(drafted.lengths, alone.lengths)
    assert np.array_equal(drafted.cache.next, alone.cache.next)
    for mine, theirs in zip(drafted.cache.layers, alone.cache.layers, strict=True):
        assert np.array_equal(np.sort(mine.positions()), np.sort(theirs.positions()))
    assert np.array_equal(np.sum(drafted.rounds * (1 + np.arange(gamma + 1)), axis=1) >= NEW - 1, [True, True])
    if gamma > 1:
        assert (np.asarray(drafted.rounds)[:, :-1].sum(axis=1) > 0).all(), "some drafts fall, or this tests nothing"
        assert (np.asarray(drafted.tokens_per_pass) > 1.3).all()


CASES = {
    "another model": (full(), lambda: Drafter(other(), full())),
    "another model and a nested cache": (nested(), lambda: Drafter(other(), full())),
    "the model with a nested cache": (full(), lambda: Drafter(target(), nested())),
    "the model with fewer tokens": (full(), lambda: Drafter(target(), snapkv(32, window=8))),
    "a compressed target": (snapkv(48, window=8), lambda: Drafter(target(), full())),
    "a compressed nested target": (kvx.chain(snapkv(64, window=8), nested()), lambda: None),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", CASES)
def test_whoever_drafts_greedy_tokens_are_those_of_the_target_alone(name):
    policy, drafter = CASES[name]
    drafted = run(speculate, policy, draft=drafter())
    assert np.array_equal(drafted.tokens, plain(policy).tokens)
    assert 0 < np.asarray(drafted.acceptance).min() + (name.startswith("another")) <= 2


@pytest.mark.slow
def test_a_drafter_with_the_target_law_is_always_accepted():
    """Also beyond block boundaries, since what a token reads does not depend on how it came."""
    rule = kvx.sampling(temperature=1.3, top_p=0.95)
    for policy in (full(), nested()):
        drafted = run(speculate, policy, draft=Drafter(target(), policy), sampling=rule, seed=4)
        # Passes over one and six tokens round differently: a chance of 1 - 1e-5 may be met.
        assert (np.asarray(drafted.acceptance) > 0.97).all()
    exact = run(speculate, quantspec(bits=None), sampling=rule, seed=4)
    assert (np.asarray(exact.acceptance) > 0.97).all()


@pytest.mark.slow
def test_rows_stop_at_their_own_stop_token_wherever_it_stands_in_a_round():
    alone = plain(nested())
    for place in (0, 1, 7, 8, 9, 10, 11, 12):
        stop = (int(alone.tokens[0, place]), int(alone.tokens[1, min(2 * place, NEW - 1)]))
        expected, found = (run(how, nested(), stop=stop) for how in (kvx.generate, speculate))
        assert np.array_equal(found.tokens, expected.tokens) and np.array_equal(found.lengths, expected.lengths)
        assert np.array_equal(found.cache.next, expected.cache.next)


@pytest.mark.parametrize("count", [1, 2, 6, 7])
def test_no_more_tokens_than_asked_for(count):
    found = run(speculate, nested(), max_new_tokens=count)
    assert np.array_equal(found.tokens, plain(nested()).tokens[:, :count])
    assert np.array_equal(found.cache.next, np.add(LENGTHS, count - 1))


def test_the_cache_goes_on_as_a_plain_one():
    """Nothing of a rejected draft is left: the next turn's logits are those after plain generation."""
    turn = np.random.default_rng(8).integers(0, 97, (2, 20)).astype(np.int32)
    logits = []
    for how in (kvx.generate, speculate):
        cache = run(how, nested()).cache
        logits.append(kvx.prefill(target(), turn, nested(), None, cache)[0])
    assert abs(np.asarray(logits[0] - logits[1])).max() < 5e-4


@pytest.mark.slow
def test_a_penalty_counts_drafts_that_stand_and_no_others():
    rule = kvx.sampling(repetition_penalty=1.5)
    expected, found = (run(how, nested(), sampling=rule) for how in (kvx.generate, speculate))
    assert np.array_equal(found.tokens, expected.tokens)
    assert not np.array_equal(found.tokens, plain(nested()).tokens)


@pytest.mark.slow
def test_a_row_of_a_batch_equals_the_row_alone():
    rule = kvx.sampling(temperature=1.0)
    seeds = (11, 12)
    together = run(speculate, nested(), sampling=rule, seed=seeds)
    for row in range(2):
        alone = run(speculate, nested(), slice(row, row + 1), sampling=rule, seed=seeds[row])
        assert np.array_equal(alone.tokens[0], together.tokens[row])
        assert np.array_equal(alone.rounds[0], together.rounds[row])


VOCABULARY, ROWS = 5, 1024


def small(layers: int = 2):
    return tiny.model(
        num_hidden_layers=layers, vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16,
    )  # fmt: skip


def joint_law(policy, rule, prompt) -> np.ndarray:
    """The law of the next three tokens under one-by-one decoding, by every text of two tokens."""
    texts = np.array(list(product(range(VOCABULARY), repeat=2)), np.int32)
    logits, cache = kvx.prefill(small(), np.tile(prompt, (len(texts), 1)), policy, max_new_tokens=8)
    laws = [law(logits, rule, None)]
    for step in range(2):
        logits, cache = kvx.decode_step(small(), texts[:, step], cache, policy)
        laws.append(law(logits, rule, None))
    first, second, third = (np.asarray(each, np.float64) for each in laws)
    rows = np.arange(len(texts))
    joint = (first[rows, texts[:, 0]] * second[rows, texts[:, 1]])[:, None] * third
    return joint.reshape((VOCABULARY,) * 3)


def surprise(counts, expected) -> float:
    """Chi-square in standard deviations from its mean, cells of less than five pooled."""
    counts, expected = counts.ravel(), expected.ravel() * counts.sum()
    few = expected < 5
    counts, expected = (np.append(array[~few], array[few].sum()) for array in (counts, expected))
    used = expected > 0
    assert counts[~used].sum() == 0
    statistic = np.sum((counts - expected)[used] ** 2 / expected[used])
    return (statistic - (used.sum() - 1)) / np.sqrt(2 * (used.sum() - 1))


RULES = {
    "all of the law": kvx.sampling(temperature=1.5),
    "top-p and a temperature": kvx.sampling(temperature=2.0, top_p=0.9),
}
DRAFTERS = {
    "narrow": lambda: (quantspec(2, group=8, gamma=2), None),
    "another model": lambda: (full(), Drafter(small(1), full())),
}


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", DRAFTERS)
def test_sampled_texts_have_the_joint_law_of_the_target(name, rule):
    """Three tokens of 8192 seeds: the first from the prompt, the others drafted, corrected or bonus."""
    policy, drafter = DRAFTERS[name]()
    prompt = np.random.default_rng(0).integers(0, VOCABULARY, (1, 40)).astype(np.int32)
    counts, stood = np.zeros((VOCABULARY,) * 3), []
    for seed in range(8):
        found = speculate(
            small(), np.tile(prompt, (ROWS, 1)), policy=policy, draft=drafter, gamma=2, max_new_tokens=4,
            sampling=RULES[rule], seed=range(seed * ROWS, (seed + 1) * ROWS),
        )  # fmt: skip
        np.add.at(counts, tuple(np.asarray(found.tokens)[:, :3].T), 1)
        stood.append(np.asarray(found.rounds).sum(axis=0))
    accepted = np.sum(stood, axis=0)
    assert (accepted[:2] > 100).all(), "drafts fall at either place, or this tests little"
    expected = joint_law(policy, RULES[rule], prompt)
    assert surprise(counts, expected) < 4
    # The control: the same count tells the law of another temperature apart.
    wrong = joint_law(policy, kvx.sampling(temperature=1.2), prompt)
    assert surprise(counts, np.where(expected > 0, np.maximum(wrong, 1e-9), 0)) > 20


def test_decisions_have_random_numbers_of_their_own():
    """Correlated, they would spoil the law: 20000 positions, drafts, uniforms and emissions."""
    draws = Draws(GREEDY, jax.vmap(jax.random.key)(jnp.arange(200, dtype=jnp.uint32)))
    positions = jnp.broadcast_to(jnp.arange(100), (200, 100))
    numbers = [np.asarray(draws.uniforms(positions, decision)).ravel() for decision in (1, 2, 3)]
    numbers += [numbers[1].reshape(200, 100)[:, ::-1].ravel(), np.roll(numbers[1].reshape(200, 100), 1, axis=0).ravel()]
    correlation = np.corrcoef(numbers) - np.eye(len(numbers))
    # 1 / sqrt(20000) is 0.007.
    assert abs(correlation).max() < 0.03


@pytest.mark.slow
def test_seeds_temperatures_and_lengths_share_a_program():
    run(speculate, nested(), sampling=kvx.sampling(temperature=0.8), seed=1, stop=(3,))
    before = _speculate._cache_size()
    run(speculate, nested(), sampling=kvx.sampling(temperature=1.8), seed=2, stop=(4, 5), max_new_tokens=20)
    run(speculate, nested(), lengths=(88, 50), sampling=kvx.sampling(temperature=1.1), seed=3)
    assert _speculate._cache_size() == before


@pytest.mark.sampled
@pytest.mark.parametrize("beside", [False, True])
def test_no_round_copies_a_cache_sized_array(beside):
    tokens, _ = tiny.prompts(600)
    policy, draft = (full(), Drafter(other(), full())) if beside else (quantspec(group=32, gamma=3), None)
    logits, cache = kvx.prefill(target(), tokens, policy, max_new_tokens=128)
    own = None if draft is None else kvx.prefill(draft.model, tokens, draft.policy, max_new_tokens=128)[1]
    shapes = large_shapes((cache, own))
    leaves, structure = jax.tree.flatten((cache, own))
    draws = Draws(GREEDY, jax.vmap(jax.random.key)(jnp.zeros(1, jnp.uint32)))

    @partial(jax.jit, donate_argnums=1)
    def rounds(model, leaves):
        cache, own = jax.tree.unflatten(structure, leaves)
        result, own = _speculate.__wrapped__(
            model, policy, draft, cache, own, logits, jnp.int32(50), draws, jnp.full(8, -1), None, gamma=3, most=128
        )
        return result.tokens, jax.tree.leaves((result.cache, own))

    assert copies(rounds.lower(target(), leaves).compile().as_text(), shapes) == 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"policy": full()}, "no narrow view to draft with"),
        ({"policy": h2o(64)}, "h2o.* cannot take back tokens"),
        ({"policy": streaming_llm(64)}, "cannot take back tokens"),
        ({"policy": quest(64, skip=(0,))}, "cannot take back tokens"),
        ({"policy": kivi(group=16, residual=16)}, "cannot take back tokens"),
        ({"policy": nested(3), "gamma": 4}, "gamma=4 is more than .* can take back; allowed: 0 to 3"),
        ({"policy": full(), "draft": lambda: Drafter(target(), h2o(64))}, "draft.policy=h2o"),
        ({"policy": full(), "draft": lambda: Drafter(small(), full())}, "a vocabulary of 5 tokens; allowed: 97"),
        ({"policy": nested(), "gamma": -1}, "gamma=-1"),
    ],
)
def test_what_cannot_be_exact_is_refused(arguments, named):
    if "draft" in arguments:
        arguments = {**arguments, "draft": arguments["draft"]()}
    with pytest.raises(kvx.BadInput, match=named):
        run(speculate, **arguments)
