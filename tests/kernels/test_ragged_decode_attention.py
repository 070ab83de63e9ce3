"""Claims about attention over heads of different length: one softmax a head, over what it holds and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvx.kernels.implementations import compiling_for
from kvx.kernels.merge_partials import Partial, merge_partials
from kvx.kernels.ragged_decode_attention import paged_decode_attention, ragged_decode_attention
from kvx.kernels.ragged_decode_attention.arg_specs import paged, ragged
from tests.kernels.interpreting import interpreted_without_races
from tests.kernels.unchecked import unchecked

ON_GPU = jax.default_backend() == "gpu"
NEW = jax.__version_info__ >= (0, 11)
needs_new = pytest.mark.skipif(not NEW, reason="Pallas on GPUs needs jax 0.11")
SCALE = 0.3


def oracle(queries, keys, values):
    """Attention of one KV head's queries (R, D), float64; (0, -inf) over nothing."""
    if not len(keys):
        return np.zeros((len(queries), values.shape[1])), np.full(len(queries), -np.inf)
    logits = SCALE * queries.astype(np.float64) @ keys.astype(np.float64).T
    lse = np.logaddexp.reduce(logits, axis=1)
    return np.exp(logits - lse[:, None]) @ values.astype(np.float64), lse


def assert_equals_oracle(part: Partial, queries, rows):
    """2e-5: float32 sums of up to 48 terms, in another order."""
    for batch, head in np.ndindex(*queries.shape[:2]):
        out, lse = oracle(np.asarray(queries)[batch, head, :, 0], *rows(batch, head))
        np.testing.assert_allclose(part.out[batch, head, :, 0], out, atol=2e-5)
        np.testing.assert_allclose(part.lse[batch, head, :, 0], lse, atol=2e-5)


def random(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


QUERIES = random(0, 2, 3, 2, 1, 8)
KEYS, VALUES = random(1, 2, 48, 8), random(2, 2, 48, 4)
reads_runs = jax.jit(
    lambda starts, lengths: ragged_decode_attention(QUERIES, KEYS, VALUES, starts, lengths, scale=SCALE)
)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 48), st.integers(0, 48)), min_size=6, max_size=6))
def test_a_run_is_attention_over_its_own_slots(runs):
    """Runs that are empty, of one slot, that overlap, or end at the row's end."""
    starts, ends = np.sort(np.asarray(runs, np.int32), axis=1).reshape(2, 3, 2).transpose(2, 0, 1)
    part = reads_runs(jnp.asarray(starts), jnp.asarray(ends - starts))
    assert_equals_oracle(
        part, QUERIES, lambda *one: tuple(np.asarray(each)[one[0], starts[one] : ends[one]] for each in (KEYS, VALUES))
    )


POOL_KEYS, POOL_VALUES = random(3, 24, 4, 8), random(4, 24, 4, 4)
reads_pages = jax.jit(
    lambda keys, values, table, lengths: paged_decode_attention(QUERIES, keys, values, table, lengths, scale=SCALE)
)


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(24)), st.lists(st.integers(0, 16), min_size=6, max_size=6))
def test_pages_in_any_order_are_their_tokens_in_order(order, lengths):
    """What lies beyond a head's length is never seen, whatever it is."""
    table, lengths = np.asarray(order, np.int32).reshape(2, 3, 4), np.asarray(lengths, np.int32).reshape(2, 3)
    keys, values = np.array(POOL_KEYS), np.array(POOL_VALUES)
    for one in np.ndindex(2, 3):
        for slot in range(lengths[one], 16):
            keys[table[one][slot // 4], slot % 4] = values[table[one][slot // 4], slot % 4] = np.nan

    def rows(*one):
        return tuple(np.asarray(each)[table[one]].reshape(16, -1)[: lengths[one]] for each in (POOL_KEYS, POOL_VALUES))

    assert_equals_oracle(reads_pages(*map(jnp.asarray, (keys, values, table, lengths))), QUERIES, rows)


def test_two_halves_of_every_run_merge_to_the_run():
    starts, lengths = jnp.asarray([[0, 20, 30], [5, 5, 47]]), jnp.asarray([[20, 10, 18], [30, 0, 1]])
    first = reads_runs(starts, lengths // 2)
    second = reads_runs(starts + lengths // 2, lengths - lengths // 2)
    whole, merged = reads_runs(starts, lengths), merge_partials(first, second)
    np.testing.assert_allclose(merged.out, whole.out, atol=1e-6)  # one more rounding
    np.testing.assert_allclose(merged.lse, whole.lse, atol=1e-6)


def test_a_row_may_hold_key_and_value_and_channels_of_a_key_may_be_the_value():
    starts, lengths = jnp.asarray([[0, 20, 30], [5, 5, 47]]), jnp.asarray([[20, 10, 18], [30, 0, 1]])
    joined = jnp.concatenate([KEYS, VALUES], axis=-1)
    apart = reads_runs(starts, lengths)
    both = ragged_decode_attention(QUERIES, joined, None, starts, lengths, scale=SCALE)
    np.testing.assert_allclose(both.out, apart.out, atol=1e-6)  # another matmul's order of sums
    inside = ragged_decode_attention(QUERIES, KEYS, None, starts, lengths, scale=SCALE, value_dim=3)
    outside = ragged_decode_attention(QUERIES, KEYS, KEYS[..., 5:], starts, lengths, scale=SCALE)
    np.testing.assert_array_equal(inside.out, outside.out)


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(ragged(1, (2, 1, 128), 24, jnp.float32), marks=pytest.mark.slow),
        paged(1, (2, 1, 128), 16, 8, jnp.float32),
    ],
)
def test_mosaic_tpu_copies_ahead_without_a_race(build):
    """Several lists, of which some end inside their first block: each starts the copies of the next."""
    arrays = jax.jit(build)(jax.random.key(0))
    function = paged_decode_attention if "table" in arrays else ragged_decode_attention
    with interpreted_without_races():
        found = jax.jit(lambda arrays: function(**arrays, scale=0.1, implementation="mosaic_tpu"))(arrays)
        jax.block_until_ready(found)
    wanted = function(**arrays, scale=0.1, implementation="reference")
    np.testing.assert_allclose(found.out, wanted.out, atol=1e-5)  # float32 in another order
    np.testing.assert_allclose(found.lse, wanted.lse, atol=1e-5)


def test_no_name_picks_the_kernel_of_the_platform_compiled_for():
    arrays = jax.eval_shape(ragged(2, (2, 4, 128), 512, jnp.bfloat16), jax.random.key(0))
    with compiling_for("tpu"):
        traced = jax.make_jaxpr(lambda arrays: ragged_decode_attention(**arrays, scale=0.1))(arrays)
    assert "pallas_call" in str(traced)
    narrow = jax.eval_shape(ragged(2, (2, 4, 64), 512, jnp.bfloat16), jax.random.key(0))
    with compiling_for("tpu"):
        traced = jax.make_jaxpr(lambda arrays: ragged_decode_attention(**arrays, scale=0.1))(narrow)
    assert "pallas_call" not in str(traced)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"implementation": "cuda"}, "'cuda'"),
        ({"implementation": "mosaic_tpu"}, "a row has 8 channels, allowed are multiples of 128"),
        ({"implementation": "triton"}, r"jax is|D is 8"),
        ({"longest": 99}, "longest is 99, allowed are 0 to the 48"),
        ({"window": 3}, "window is 3"),
        ({"values": None}, "value_dim is 0"),
        ({"value_dim": 5}, "value_dim is 5"),
        ({"keys": KEYS[..., :7]}, "7 channels"),
        ({"query_positions": jnp.zeros((2, 1), jnp.int32)}, "together"),
        ({"keys": KEYS[:1], "values": VALUES[:1]}, r"keys has shape \(1, 48, 8\), allowed is \(2, any, any\)"),
        ({"values": VALUES[:, 1:]}, r"values has shape \(2, 47, .\), allowed is \(2, 48, any\)"),
        ({"starts": jnp.ones((2, 1), jnp.int32)}, r"starts has shape \(2, 1\), allowed is \(2, 3\)"),
        ({"lengths": jnp.ones((1, 3), jnp.int32)}, r"lengths has shape \(1, 3\), allowed is \(2, 3\)"),
        ({"softcap": 0.0}, "softcap is 0.0"),
    ],
)
def test_what_it_cannot_take_is_refused(changed, message):
    lengths = jnp.ones((2, 3), jnp.int32)
    given = {"queries": QUERIES, "keys": KEYS, "values": VALUES, "starts": lengths, "lengths": lengths, "scale": 1.0}
    with unchecked(), pytest.raises(ValueError, match=message):
        ragged_decode_attention(**given | changed)
