"""Claims about QuantSpec as a policy: an 8-bit cache under plain generation, its identities, and what it refuses."""

import jax
import numpy as np
import pytest

import kvx
from kvx.policies import full, h2o, kivi, quantspec, snapkv
from tests.tiny import model, prompts

LENGTHS = (90, 41)
NEW = 40


def forced_logits(policy, narrow: bool = False):
    """Logits of every step of a fixed continuation, and the cache after it."""
    small = model(num_hidden_layers=2)
    tokens, lengths = prompts(*LENGTHS)
    continuation = np.random.default_rng(3).integers(0, 97, (len(LENGTHS), NEW)).astype(np.int32)
    logits, cache = kvx.prefill(small, tokens, policy, lengths, max_new_tokens=NEW)
    cache, every = cache.narrow() if narrow else cache, [logits]
    for step in range(NEW):
        logits, cache = kvx.decode_step(small, continuation[:, step], cache, policy)
        every.append(logits)
    return np.stack(every), cache


def test_without_bits_it_is_the_full_cache():
    exact, _ = forced_logits(full())
    same, _ = forced_logits(quantspec(bits=None))
    assert abs(same - exact).max() <= 1e-5 * abs(exact).max()


def test_what_fits_the_buffer_is_exact():
    exact, _ = forced_logits(full())
    # 90 + 40 tokens stay below 2 n: every query reads the exact buffer.
    same, cache = forced_logits(quantspec(group=128))
    assert abs(same - exact).max() <= 1e-5 * abs(exact).max()
    assert (np.asarray(cache.layers[0].slots)[0] >= 0).sum(-1).tolist() == [128, 128], "though a block is coded"


@pytest.mark.slow
def test_both_nibbles_are_as_good_as_eight_bits_and_the_upper_ones_as_four():
    exact, _ = forced_logits(full())
    rms = lambda *arguments: np.sqrt(np.mean((forced_logits(*arguments)[0] - exact) ** 2))  # noqa: E731
    both, upper = rms(quantspec(group=16)), rms(quantspec(group=16), True)
    eight, four = (rms(kivi(bits=bits, group=16, residual=32)) for bits in (8, 4))
    # An eighth of a lower step more at the clipped end, and other boundaries between codes and tail.
    assert both < 2 * eight and four / 2 < upper < 2 * four
    assert upper > 8 * both


def test_the_default_takes_a_head_of_any_width_below_the_group():
    tokens, lengths = prompts(300, 280)
    _, cache = kvx.prefill(model(num_hidden_layers=2), tokens, quantspec(), lengths, max_new_tokens=4)
    assert cache.layers[0].values.ranges.shape[-2] == 1, "one range for all 32 channels"


def test_it_takes_fewer_bytes_and_a_draft_reads_fewer_still():
    tokens, lengths = prompts(400, 390)
    policies = (full(), quantspec(group=16))
    _, (exact, coded) = kvx.prefill(model(num_hidden_layers=2), tokens, policies, lengths, max_new_tokens=4)
    assert exact.nbytes > 2 * coded.nbytes and coded.narrow().nbytes == coded.nbytes
    codes = sum(store.keys.lower.nbytes + store.values.lower.nbytes for store in coded.layers)
    assert coded.narrow().bytes_read() == coded.bytes_read() - codes


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"bits": 5}, "bits=5"),
        ({"bits": True}, "bits=True"),
        ({"group": 0}, "group=0"),
        ({"gamma": -1}, "gamma=-1"),
        ({"group": 8, "gamma": 8}, "gamma=8 is not below group=8; allowed: 0 to 7"),
    ],
)
def test_impossible_hyperparameters_are_refused(arguments, named):
    with pytest.raises(kvx.BadInput, match=named):
        quantspec(**arguments)


@pytest.mark.parametrize(
    ("policy", "head_dim", "named"),
    [
        (quantspec(group=32), 48, "group=32 does not divide the head dim 48"),
        (quantspec(3, group=16), 16, "bits=3 does not fill"),
    ],
)
def test_a_head_dim_that_does_not_divide_is_refused_before_any_work(policy, head_dim, named):
    tokens, lengths = prompts(8)
    with pytest.raises(kvx.BadInput, match=named):
        kvx.prefill(model(num_hidden_layers=2, head_dim=head_dim), tokens, policy, lengths)


def test_it_follows_what_acts_once_and_nothing_that_evicts_at_every_step():
    assert kvx.chain(snapkv(64), quantspec()).undoes == 6
    with pytest.raises(kvx.BadInput, match="cannot evict at every step"):
        kvx.chain(h2o(64), quantspec())
    with pytest.raises(kvx.BadInput, match="nothing can follow"):
        kvx.chain(quantspec(), snapkv(64))


def test_the_policy_is_a_pytree_without_leaves_and_names_its_call():
    policy = quantspec(group=64, gamma=3)
    assert not jax.tree.leaves(policy) and policy.text == "quantspec(group=64, gamma=3)"
    assert kvx.parse_policy(policy.text) == policy and policy.nbytes == 0
