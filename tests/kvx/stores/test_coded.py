"""Claims about the coded store: error bound, balance, appends that equal packing, bytes, writes in place."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvx.errors import BadInput
from kvx.parts.balance import balance
from kvx.stores.base import nbytes
from kvx.stores.coded import Code, Coded
from tests.kvx.stores.one_layer import GROUP, HEADS, WIDTH, attention, copies, query, tokens

CODES = st.sampled_from([(2, 16), (2, 32), (3, 32), (4, 8)])
FEW = settings(max_examples=8, deadline=None)


def everything(these):
    return jnp.ones(these.positions.shape, bool)


def factors(seed=3):
    return jnp.asarray(np.exp(np.random.default_rng(seed).normal(size=(2, HEADS, WIDTH))), jnp.float32)


@partial(jax.jit, static_argnums=(1, 2, 3))
def packed(these, capacity=16, bits=2, group=None, beta=None):
    return Coded.pack(these, everything(these), capacity, code=Code(bits, group), balance=beta)


append = jax.jit(Coded.append)


@FEW
@given(code=CODES, seed=st.integers(0, 99), balanced=st.booleans())
def test_error_is_at_most_half_a_step_of_the_balanced_key(code, seed, balanced):
    bits, group = code
    these = tokens([[0, 1, 2, 3, 4, 5, 6, 7]] * 2, seed)
    beta = factors(seed) if balanced else None
    keys, values, _ = packed(these, 8, bits, group, beta).dense()
    scale = np.asarray(beta)[:, :, None] if balanced else 1.0
    for true, seen in ((np.asarray(these.keys) * scale, keys * scale), (np.asarray(these.values), values)):
        runs = true.reshape(*true.shape[:3], -1, group)
        step = (runs.max(-1) - runs.min(-1)) / (2**bits - 1)
        # The stored step is a bfloat16 rounded up, from a minimum rounded down: at most 2^-7 more of each.
        slack = 2.0**-7 * (step + 2 * np.abs(runs).max(-1) / (2**bits - 1))
        error = np.abs(np.asarray(seen) - true).reshape(runs.shape).max(-1)
        assert np.all(error <= (step + slack) / 2 + 1e-5)


@FEW
@given(seed=st.integers(0, 99))
def test_balancing_leaves_products_alone_and_equalises_channel_maxima(seed):
    random = np.random.default_rng(seed)
    q, k = (random.normal(size=(20, WIDTH)) * np.exp(random.normal(size=WIDTH)) for _ in range(2))
    peaks = [np.abs(x).max(0)[None, None].astype(np.float32) for x in (q, k)]
    beta = np.asarray(balance(*map(jnp.asarray, peaks)), np.float64)[0, 0]
    np.testing.assert_allclose((q / beta) @ (k * beta).T, q @ k.T, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(np.abs(q / beta).max(0), np.abs(k * beta).max(0), rtol=1e-5)
    assert balance(*map(jnp.asarray, peaks)).dtype == jnp.float32


@pytest.mark.parametrize("dead", [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_a_dead_channel_has_a_finite_positive_factor(dead):
    peaks = [jnp.ones((1, 1, 4)).at[..., 0].set(peak) for peak in dead]
    beta = balance(*peaks)
    assert np.all(np.isfinite(beta)) and np.all(beta > 0)
    assert np.all(np.isfinite(balance(jnp.zeros((1, 1, 4)), jnp.zeros((1, 1, 4)))))


@pytest.mark.parametrize("bits", [2, 3, None])
def test_one_by_one_equals_packing_at_once(bits):
    these, beta = tokens([[0, 1, 2, 3, 4, 5]] * 2), factors()
    grown = packed(these, bits=bits, beta=beta)
    grown = replace(grown, slots=jnp.full_like(grown.slots, -1))
    for index in range(6):
        grown = append(grown, these.take(jnp.full((2, HEADS, 1), index), jnp.ones((2, HEADS, 1), bool)))
    for one, other in zip(grown.dense(), packed(these, bits=bits, beta=beta).dense(), strict=True):
        np.testing.assert_array_equal(one[:, :, :6], other[:, :, :6])
    assert np.all(np.asarray(grown.positions()[:, :, 6:]) == -1)


def test_exact_code_stands_for_the_tokens_themselves():
    these = tokens([[0, 1, 2, 3]] * 2)
    keys, values, positions = packed(these, 4, None, beta=factors()).dense()
    np.testing.assert_allclose(keys, these.keys, rtol=1e-6)
    np.testing.assert_array_equal(values, these.values)
    np.testing.assert_array_equal(positions, these.positions)


def test_an_absent_token_changes_nothing():
    store = packed(tokens([[0, 1, 2, 3]] * 2), beta=factors())
    after = store.append(tokens([[-1], [4]], seed=5))
    for one, other in zip(store.dense(), after.dense(), strict=True):
        np.testing.assert_array_equal(np.asarray(one)[0, :, :4], np.asarray(other)[0, :, :4])
    np.testing.assert_array_equal(after.positions()[0], store.positions()[0])
    np.testing.assert_array_equal(after.positions()[1, :, 4], 4)


@pytest.mark.parametrize(("bits", "balanced"), [(2, True), (3, False), (4, True), (None, True)])
def test_read_is_attention_over_the_dense_contents(bits, balanced):
    store = packed(tokens([[0, 1, 2, 3, 4], [0, 1, 2, -1, -1]]), bits=bits, beta=factors() if balanced else None)
    asked = query([[5], [3]])
    out, lse, probabilities = attention(asked, *store.dense())
    part = store.read(asked)
    np.testing.assert_allclose(part.out, out, atol=2e-5)
    np.testing.assert_allclose(part.lse, lse, atol=2e-5)
    np.testing.assert_allclose(store.probabilities(asked, part.lse), probabilities, atol=2e-5)


def test_release_frees_the_weakest_slot_for_the_next_token():
    store = packed(tokens([[0, 1, 2, 3]] * 2, mass=np.tile([3.0, 1.0, 1.0, 2.0], (2, HEADS, 1))), 5)
    store = store.release(store.stats["mass"], jnp.asarray([[1, 0], [1, 1]]))
    np.testing.assert_array_equal(store.positions()[0], [[0, 1, -1, 3, -1], [0, 1, 2, 3, -1]])
    store = store.append(tokens([[4], [4]], seed=5, mass=np.zeros((2, HEADS, 1))))
    np.testing.assert_array_equal(store.positions()[0], [[0, 1, 4, 3, -1], [0, 1, 2, 3, 4]])
    np.testing.assert_array_equal(store.stats["mass"][0, 0, :4], [3, 1, 0, 2])


@pytest.mark.parametrize(("bits", "group"), [(2, 16), (3, 32), (4, 8), (8, 32)])
def test_bytes_follow_the_closed_form(bits, group):
    these, capacity = tokens([[0, 1, 2, 3]] * 2), 48
    store = packed(these, capacity, bits, group, factors())
    slot = 2 * WIDTH * bits // 8 + 4 * 2 * WIDTH // group + 4
    rotation = 4 * WIDTH // 2 + 4
    assert nbytes(store) == 2 * HEADS * (capacity * slot + 4 * WIDTH) + rotation
    assert store.bytes_read() == nbytes(store)


def test_widths_that_do_not_pack_are_refused():
    with pytest.raises(BadInput, match=r"bits=3 .* keys .* 48 channels .* allowed"):
        Code(3).check(48, "keys")
    with pytest.raises(BadInput, match=r"group=12 does not divide values of 32 channels; allowed: divisors of 32"):
        Code(2, 12).check(32, "values")
    Code(None, 12).check(31, "keys")
    assert Code(2).channels(64) == 32 and Code(3).channels(64) == Code(4).channels(64) == 64


def test_appending_writes_in_place_and_the_counter_sees_a_copy():
    store, fresh = packed(tokens([[0, 1, 2, 3]] * 2), 64, beta=factors()), tokens([[4]] * 2, seed=4)
    asked = query([[4]] * 2)

    def before(store):
        store = store.append(fresh)
        return store.read(asked), store

    def after(store):
        return store.read(asked), store.append(fresh)

    assert copies(before, store) == 0
    assert copies(after, store) > 0


def test_query_heads_share_the_balance_of_their_kv_head():
    store = packed(tokens([[0, 1, 2]] * 2), bits=None, beta=factors())
    plain = packed(tokens([[0, 1, 2]] * 2), bits=None)
    asked = query([[3]] * 2)
    assert store.read(asked).out.shape == (2, HEADS, GROUP, 1, WIDTH)
    np.testing.assert_allclose(store.read(asked).out, plain.read(asked).out, atol=1e-5)
