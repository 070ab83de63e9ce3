"""KIVI as a policy: identities, chains with selections, ragged batches, refusals."""

import jax
import numpy as np
import pytest

import kvx
from kvx.policies import full, h2o, kivi, pyramidkv, snapkv, tova
from kvx.stores.packed import Packed
from tests.tiny import model, prompts

LENGTHS = (90, 41)
SMALL = {"group": 16, "residual": 32}


def small_model():
    return model(num_hidden_layers=2)


def run(policy, lengths=LENGTHS, new=40, rows=slice(None), **arguments):
    """Greedy generation, and the logits after the prompt."""
    tokens, lengths = prompts(*lengths)
    return kvx.generate(
        small_model(), tokens[rows], policy=policy, lengths=lengths[rows], max_new_tokens=new, **arguments
    )


def forced_logits(policy, new=40):
    """Logits of every step of a fixed continuation, so that policies are compared on the same text."""
    tokens, lengths = prompts(*LENGTHS)
    continuation = np.random.default_rng(3).integers(0, 97, (len(LENGTHS), new)).astype(np.int32)
    logits, cache = kvx.prefill(small_model(), tokens, policy, lengths, max_new_tokens=new)
    every = [logits]
    for step in range(new):
        logits, cache = kvx.decode_step(small_model(), continuation[:, step], cache, policy)
        every.append(logits)
    return np.stack(every), cache


def test_without_bits_it_is_the_full_cache():
    exact, _ = forced_logits(full())
    same, _ = forced_logits(kivi(bits=None, **SMALL))
    assert abs(same - exact).max() <= 1e-5 * abs(exact).max()


def test_what_fits_the_tail_is_exact():
    exact, _ = forced_logits(full(), new=30)
    # 90 + 30 tokens stay below R: nothing is ever packed.
    same, cache = forced_logits(kivi(bits=2, group=16, residual=128), new=30)
    assert abs(same - exact).max() <= 1e-5 * abs(exact).max()
    assert all((np.asarray(store.slots) < 0).all() for store in cache.layers)


@pytest.mark.slow
def test_more_bits_are_closer_to_the_full_cache():
    exact, _ = forced_logits(full(), new=8)
    errors = [np.sqrt(np.mean((forced_logits(kivi(bits, **SMALL), new=8)[0] - exact) ** 2)) for bits in (2, 4, 8)]
    # Two bits more shrink a step to a fifth or less; half of that is asked, since the softmax bends.
    assert errors[0] > 2 * errors[1] > 4 * errors[2] > 0


SELECTIONS = {
    "snapkv": snapkv(budget=48, window=16),
    "pyramidkv": pyramidkv(budget=48, window=16),
    "h2o": h2o(budget=60),
    "tova": tova(budget=60),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SELECTIONS)
def test_a_row_of_a_batch_equals_the_row_alone_under_a_selection(name):
    policy = kvx.chain(SELECTIONS[name], kivi(bits=4, **SMALL))
    together = run(policy)
    for row in range(len(LENGTHS)):
        alone = run(policy, rows=slice(row, row + 1))
        assert (together.tokens[row] == alone.tokens[0]).all()
        for mine, single in zip(together.cache.layers, alone.cache.layers, strict=True):
            assert isinstance(mine, Packed)
            ours, theirs = np.asarray(mine.positions())[row], np.asarray(single.positions())[0]
            for head in range(ours.shape[0]):
                assert (np.sort(ours[head][ours[head] >= 0]) == np.sort(theirs[head][theirs[head] >= 0])).all()
            # Slots may be laid out alike or not; a token's codes are compared by its position.
            differing = total = 0
            for head in range(ours.shape[0]):
                for left, right in zip(mine.dense()[:2], single.dense()[:2], strict=True):
                    left = np.asarray(left)[row, head][np.argsort(ours[head])][(ours[head] < 0).sum() :]
                    right = np.asarray(right)[0, head][np.argsort(theirs[head])][(theirs[head] < 0).sum() :]
                    differing += (abs(left - right) > 1e-3).sum()
                    total += left.size
            # Keys differ by float rounding from one batch shape to the other; one on a tie may take the next code.
            assert differing <= 1e-3 * total


@pytest.mark.sampled
@pytest.mark.parametrize("name", ["h2o", "tova"])
def test_eviction_at_every_step_runs_endlessly_in_constant_memory(name):
    policy = kvx.chain(SELECTIONS[name], kivi(bits=2, **SMALL))
    tokens, lengths = prompts(*LENGTHS)
    _, short = kvx.prefill(small_model(), tokens, policy, lengths, max_new_tokens=1)
    nbytes = short.nbytes
    cache = run(policy, new=300).cache
    assert cache.nbytes == kvx.prefill(small_model(), tokens, policy, lengths, max_new_tokens=300)[1].nbytes
    assert cache.nbytes <= nbytes * 1.01
    for store in cache.layers:
        held = np.sum(np.asarray(store.positions()) >= 0, axis=-1)
        # The budget, and less than a group beyond it: a group leaves as soon as it is in excess.
        assert (held < 60 + 16).all() and (held >= 60).all()
        newest = np.asarray(store.positions()).max(axis=-1)
        assert (newest == np.asarray(cache.next)[:, None] - 1).all()


def test_only_selected_tokens_are_packed():
    tokens, lengths = prompts(*LENGTHS)
    selection = SELECTIONS["snapkv"]
    _, (chosen, coded) = kvx.prefill(
        small_model(), tokens, (selection, kvx.chain(selection, kivi(bits=2, **SMALL))), lengths, max_new_tokens=8
    )
    for one, other in zip(chosen.layers, coded.layers, strict=True):
        held = [np.sort(np.asarray(store.positions()), axis=-1)[..., -41:] for store in (one, other)]
        assert (held[0] == held[1]).all()


@pytest.mark.slow
def test_chunks_pack_what_one_pass_packs():
    policy = kivi(bits=4, **SMALL)
    whole, pieces = run(policy), run(policy, prefill_chunk=32)
    for one, other in zip(whole.cache.layers, pieces.cache.layers, strict=True):
        assert (np.asarray(one.positions()) == np.asarray(other.positions())).all()
    cut = run(kvx.chain(snapkv(budget=48, window=16), policy), prefill_chunk=32, compress="chunk")
    assert all(isinstance(store, Packed) for store in cut.cache.layers)


def test_low_bits_take_fewer_bytes():
    tokens, lengths = prompts(400)
    policies = (full(), kivi(4, **SMALL), kivi(2, **SMALL))
    _, caches = kvx.prefill(small_model(), tokens, policies, lengths, max_new_tokens=4)
    assert caches[0].nbytes > 3 * caches[1].nbytes > 3 * caches[2].nbytes


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"bits": 5}, "bits=5"),
        ({"bits": True}, "bits=True"),
        ({"group": 0}, "group=0"),
        ({"residual": 0}, "residual=0"),
        ({"group": 32, "residual": 48}, "residual=48 is not a multiple of group=32"),
    ],
)
def test_impossible_hyperparameters_are_refused(arguments, named):
    with pytest.raises(kvx.BadInput, match=named):
        kivi(**arguments)


@pytest.mark.parametrize(
    ("policy", "head_dim", "named"),
    [(kivi(group=32), 48, "group=32 does not divide the head dim 48"), (kivi(3, 8, 16), 16, "bits=3 does not fill")],
)
def test_a_head_dim_that_does_not_divide_is_refused_before_any_work(policy, head_dim, named):
    tokens, lengths = prompts(8)
    with pytest.raises(kvx.BadInput, match=named):
        kvx.prefill(model(num_hidden_layers=2, head_dim=head_dim), tokens, policy, lengths)


def test_nothing_can_follow_it_in_a_chain():
    with pytest.raises(kvx.BadInput, match="nothing can follow"):
        kvx.chain(kivi(), snapkv(64))


def test_the_policy_is_a_pytree_without_leaves_and_names_its_call():
    policy = kivi(bits=4, residual=64)
    assert not jax.tree.leaves(policy) and policy.text == "kivi(bits=4, residual=64)"
    assert kvx.policy("kivi", bits=2) == kivi(bits=2) and policy.nbytes == 0
