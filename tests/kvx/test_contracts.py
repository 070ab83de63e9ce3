"""The contracts of every policy, over one table of cases (`contract_cases.py`)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvx
from kvx.cache import ENDLESS
from tests import tiny
from tests.kvx import forced_run
from tests.kvx.contract_cases import CASES, KINDS, LATENT, parameters
from tests.kvx.forced_run import LENGTHS, STEPS, forced, run

BUDGET = 48


@pytest.fixture(scope="module", name="model")
def three_layers():
    return forced_run.model()


def kept(cache, row: int) -> list[list[set[int]]]:
    """Positions kept by layer and head."""
    everything = [np.asarray(layer.positions()[row]) for layer in cache.layers]
    return [[set(head[head >= 0].tolist()) for head in layer] for layer in everything]


def test_every_registered_method_has_a_case():
    used = {name.split(" ")[0] for text in CASES for name in text.split("+")}
    assert set(kvx.policies.names()) <= used | LATENT


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", parameters())
def test_a_row_of_a_batch_equals_the_row_alone(model, name):
    """Kept positions exactly; log-probabilities within 5e-4 where the store does not round."""
    case = CASES[name]
    tokens, lengths = tiny.prompts(*LENGTHS)
    scores, cache = run(model, case.build(BUDGET), tokens, lengths, forced())
    unrounded, _ = run(model, case.exact(BUDGET), tokens, lengths, forced())
    for row, length in enumerate(lengths):
        prompt, continuation = tokens[row : row + 1, :length], forced()[row : row + 1]
        alone, single = run(model, case.build(BUDGET), prompt, None, continuation)
        assert kept(single, 0) == kept(cache, row)
        # A packed store is discontinuous: float noise of 1e-6 may flip a code. None flip here, but the bound is loose.
        assert np.abs(alone[0] - scores[row]).max() < (5e-4 if case.lossless is None else 0.1)
        exact, _ = run(model, case.exact(BUDGET), prompt, None, continuation)
        assert np.abs(exact[0] - unrounded[row]).max() < 5e-4


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", parameters(name for name, case in CASES.items() if case.evicts))
@pytest.mark.parametrize("budget", [BUDGET, 0.4])
def test_the_budget_bounds_what_is_kept_and_bytes_are_saved(model, name, budget):
    """Slots averaged over layers and heads: the total for bounded policies, plus generated tokens for the others."""
    tokens, lengths = tiny.prompts(*LENGTHS)
    policy = CASES[name].build(budget)
    _, cache = run(model, policy, tokens, lengths, forced())
    for row, length in enumerate(lengths):
        counts = [len(head) for layer in kept(cache, row) for head in layer]
        allowed = budget if isinstance(budget, int) else max(int(budget * length), 8)
        generated = 0 if policy.bounded else STEPS
        assert np.mean(counts) <= min(allowed, length + STEPS) + generated
        if length > allowed:
            assert np.mean(counts) >= allowed - 1, "and it is used"
    _, everything = run(model, kvx.policies.full(), tokens, lengths, forced())
    if "quest" not in name:  # it adds page bounds to whatever is kept
        assert cache.nbytes < everything.nbytes


ALONE = [name for name, case in CASES.items() if case.build(BUDGET).alone]
"""Policies that change what later layers compute: they need the whole prompt at once, and a pass for themselves."""

IN_COMPANY = [name for name in CASES if name not in ALONE]


@pytest.mark.parametrize("name", parameters(ALONE))
def test_a_policy_that_changes_the_pass_refuses_company_and_chunks(model, name):
    tokens, lengths = tiny.prompts(*LENGTHS)
    policy = CASES[name].build(BUDGET)
    with pytest.raises(kvx.BadInput, match="changes what later layers compute; allowed: it alone"):
        kvx.prefill(model, tokens, (policy, kvx.policies.full()), lengths)
    with pytest.raises(kvx.BadInput, match="needs the whole prompt at once; allowed: None"):
        kvx.prefill(model, tokens, policy, lengths, prefill_chunk=32)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", parameters(IN_COMPANY))
def test_chunked_prefill_that_compresses_at_the_end_equals_unchunked(model, name):
    tokens, lengths = tiny.prompts(*LENGTHS)
    whole, cache = run(model, CASES[name].exact(BUDGET), tokens, lengths, forced())
    chunked, pieces = run(model, CASES[name].exact(BUDGET), tokens, lengths, forced(), prefill_chunk=32)
    assert [kept(cache, row) for row in range(3)] == [kept(pieces, row) for row in range(3)]
    assert np.abs(whole - chunked).max() < 5e-4


@pytest.mark.sampled
@pytest.mark.parametrize("name", parameters(name for name, case in CASES.items() if case.chunked and case.evicts))
def test_cutting_every_chunk_keeps_the_budget(model, name):
    tokens, lengths = tiny.prompts(*LENGTHS)
    policy = CASES[name].build(BUDGET)
    _, cache = kvx.prefill(model, tokens, policy, lengths, prefill_chunk=32, compress="chunk")
    for row, length in enumerate(lengths):
        counts = [len(head) for layer in kept(cache, row) for head in layer]
        assert np.mean(counts) <= min(BUDGET, length)


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_tuple_of_policies_shares_one_pass_and_changes_nothing(model, every):
    tokens, lengths = tiny.prompts(*LENGTHS)
    policies = tuple(CASES[name].build(BUDGET) for name in IN_COMPANY if every or name in KINDS)
    shared, caches = kvx.prefill(model, tokens, policies, lengths)
    for policy, cache in zip(policies, caches, strict=True):
        logits, single = kvx.prefill(model, tokens, policy, lengths)
        assert np.abs(np.asarray(shared - logits)).max() < 5e-4
        assert [kept(cache, row) for row in range(3)] == [kept(single, row) for row in range(3)]
        assert cache.nbytes == single.nbytes


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", parameters())
def test_a_row_that_has_ended_leaves_its_cache_as_it_is(model, name):
    """Rows of unequal continuation: the shorter one's kept tokens equal those of stopping there."""
    tokens, lengths = tiny.prompts(*LENGTHS)
    policy = CASES[name].build(BUDGET)
    ends = np.array([STEPS, 5, 9], np.int32)
    _, cache = kvx.prefill(model, tokens, policy, lengths, max_new_tokens=STEPS)
    logits, cache = kvx.prefill(model, forced(), policy, ends, cache)
    assert np.array_equal(np.asarray(cache.next), lengths + ends)
    _, stopped = kvx.prefill(model, tokens, policy, lengths, max_new_tokens=STEPS)
    short, stopped = kvx.prefill(model, forced()[:, :5], policy, None, stopped)
    assert kept(cache, 1) == kept(stopped, 1)
    assert np.abs(np.asarray(logits[1] - short[1])).max() < 5e-4


def is_endless(name: str) -> bool:
    """Whether every layer of the tiny model stays within its budget."""
    policy = CASES[name].build(BUDGET)
    return all(policy.at(layer, 3).bounded for layer in range(3))


@pytest.mark.sampled
@pytest.mark.parametrize("name", parameters(name for name in CASES if is_endless(name)))
def test_a_bounded_policy_runs_past_its_room_in_constant_memory(model, name):
    tokens, lengths = tiny.prompts(*LENGTHS)
    policy = CASES[name].build(BUDGET)
    _, cache = kvx.prefill(model, tokens, policy, lengths, max_new_tokens=STEPS)
    before, shapes = cache.nbytes, [leaf.shape for leaf in jax.tree.leaves(cache)]
    text = np.random.default_rng(2).integers(0, 97, (3, 300)).astype(np.int32)
    logits, cache = kvx.prefill(model, text, policy, None, cache)
    assert cache.nbytes == before and [leaf.shape for leaf in jax.tree.leaves(cache)] == shapes
    assert bool(jnp.all(jnp.isfinite(logits)))
    for layer in cache.layers:
        newest = np.asarray(layer.positions()).max(axis=(1, 2))
        # TOVA may drop the newest token at once; every other rule protects it or ranks it by what it received.
        assert (newest >= lengths + 300 - 40).all()


@pytest.mark.sampled
@pytest.mark.parametrize("name", ["snapkv", "d2o", "kivi"])
def test_a_cache_without_room_refuses_more_tokens(model, name):
    """d2o is bounded, but its exempt first layer is not."""
    tokens, lengths = tiny.prompts(*LENGTHS)
    policy = CASES[name].build(BUDGET)
    _, cache = kvx.prefill(model, tokens, policy, lengths, max_new_tokens=STEPS)
    text = np.zeros((3, 300), np.int32)
    with pytest.raises(kvx.BadInput, match="room for 128 more tokens, 300 are needed"):
        kvx.prefill(model, text, policy, None, cache)


def test_a_budget_beyond_prompt_and_room_is_not_endless(model):
    """Its slots were cut to what can come; more would be dropped in silence."""
    tokens, lengths = tiny.prompts(*LENGTHS)
    _, cache = kvx.prefill(model, tokens, kvx.policies.h2o(4096), lengths, max_new_tokens=STEPS)
    assert int(cache.room) == 128
    _, cache = kvx.prefill(model, tokens, kvx.policies.h2o(BUDGET), lengths, max_new_tokens=STEPS)
    assert int(cache.room) == ENDLESS


@pytest.mark.parametrize("name", parameters())
def test_nbytes_is_the_sum_of_the_arrays(model, name):
    tokens, lengths = tiny.prompts(*LENGTHS)
    _, cache = kvx.prefill(model, tokens, CASES[name].build(BUDGET), lengths, max_new_tokens=STEPS)
    assert cache.nbytes == sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(cache))
    assert 0 < cache.bytes_read() <= CASES[name].reads * cache.nbytes
