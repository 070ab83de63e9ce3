"""Claims about the sparse read: attention over what was chosen, as if nothing else were held."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvx.kernels.decode_attention import decode_attention
from kvx.kernels.sparse_decode_attention import sparse_decode_attention
from kvx.kernels.sparse_decode_attention.arg_specs import sparse
from tests.kernels.interpreting import interpreted_without_races
from tests.kernels.unchecked import unchecked

ON_GPU = jax.default_backend() == "gpu"
needs_new = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="Pallas on GPUs needs jax 0.11")


def random(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


QUERIES, KEYS, VALUES = random(0, 1, 2, 4, 2, 8), random(1, 1, 2, 24, 8), random(2, 1, 2, 24, 4)
AT = jnp.asarray([[20, 21]], jnp.int32)
SLOTS = jnp.tile(jnp.where(jnp.arange(24) < 22, jnp.arange(24), -1), (1, 2, 1))


def masked(slots):
    """The dense read of a cache in which only these slots are held, as xla does it."""
    return decode_attention(QUERIES, KEYS, VALUES, AT, slots, scale=0.3, implementation="xla")


reads_pages = jax.jit(
    lambda chosen: sparse_decode_attention(QUERIES, KEYS, VALUES, AT, SLOTS, chosen, page=4, scale=0.3)
)
reads_all = jax.jit(masked)


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(6)), st.permutations(range(6)), st.integers(0, 6), st.integers(0, 6))
def test_chosen_pages_are_all_that_is_held(first, second, few, many):
    """In any order, none and all of them included."""
    chosen = np.asarray([first, second], np.int32)
    chosen = np.where(np.arange(6) < np.asarray([[few], [many]]), chosen, -1)
    part = reads_pages(jnp.asarray(chosen[None, :, None, None]))
    kept = np.stack([np.isin(np.arange(24) // 4, row[row >= 0]) for row in chosen])
    wanted = reads_all(jnp.where(kept[None], SLOTS, -1))
    np.testing.assert_allclose(part.out, wanted.out, atol=1e-6)  # float32 sums in another order
    np.testing.assert_allclose(part.lse, wanted.lse, atol=1e-6)


def test_a_choice_of_its_own_for_every_query_head_and_query():
    """Pages of one slot; each choice read by itself is the same."""
    chosen = np.stack([np.random.default_rng(seed).permutation(24)[:5] for seed in range(16)])
    chosen = jnp.asarray(chosen.reshape(1, 2, 4, 2, 5), jnp.int32)
    options = {"page": 1, "scale": 0.3}
    part = sparse_decode_attention(QUERIES, KEYS, VALUES, AT, SLOTS, chosen, **options)
    for head in range(4):
        for one in range(2):
            alone = sparse_decode_attention(
                QUERIES[:, :, head : head + 1, one : one + 1],
                KEYS,
                VALUES,
                AT[:, one : one + 1],
                SLOTS,
                chosen[:, :, head : head + 1, one : one + 1],
                **options,
            )
            np.testing.assert_allclose(part.out[:, :, head, one], alone.out[:, :, 0, 0], atol=1e-6)


@pytest.mark.slow
def test_mosaic_tpu_reads_only_chosen_pages_without_a_race():
    """Pages that are not chosen hold nan, which would show."""
    arrays = jax.jit(sparse(1, (2, 2, 128), 64, 8, 3, jnp.float32, short=2))(jax.random.key(0))
    chosen = np.asarray(arrays["chosen"]).reshape(2, -1)
    held = np.stack([np.isin(np.arange(64) // 8, row[row >= 0]) for row in chosen])[None, ..., None]
    poisoned = arrays | {name: jnp.where(held, arrays[name], jnp.nan) for name in ("keys", "values")}
    with interpreted_without_races():
        found = jax.jit(
            lambda arrays: sparse_decode_attention(**arrays, page=8, scale=0.1, implementation="mosaic_tpu")
        )(poisoned)
        jax.block_until_ready(found)
    wanted = sparse_decode_attention(**arrays, page=8, scale=0.1, implementation="reference")
    np.testing.assert_allclose(found.out, wanted.out, atol=1e-5)  # float32 in another order
    np.testing.assert_allclose(found.lse, wanted.lse, atol=1e-5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"page": 5}, "page is 5, allowed are divisors of the 24 slots"),
        ({"chosen": jnp.zeros((1, 2, 3, 1, 1), jnp.int32)}, "3 choices a KV head"),
        ({"chosen": jnp.zeros((1, 2, 1, 3, 1), jnp.int32)}, "choices for 3 queries"),
        ({"implementation": "mosaic_tpu"}, "a row has 8 channels"),
        ({"implementation": "triton"}, r"jax is|D is 8"),
        ({"value_dim": 9}, "value_dim is 9"),
        ({"window": 0}, "window is 0, allowed are None and integers from 1 up"),
        ({"softcap": -2.0}, "softcap is -2.0"),
        ({"keys": KEYS[:, :1], "values": VALUES[:, :1], "key_positions": SLOTS[:, :1]}, r"keys has shape \(1, 1, "),
        ({"query_positions": jnp.zeros((2, 2), jnp.int32)}, r"query_positions has shape \(2, 2\)"),
    ],
)
def test_what_it_cannot_take_is_refused(changed, message):
    given = {"queries": QUERIES, "keys": KEYS, "values": VALUES, "query_positions": AT, "key_positions": SLOTS}
    given |= {"chosen": jnp.zeros((1, 2, 1, 1, 1), jnp.int32), "page": 4, "scale": 1.0}
    with unchecked(), pytest.raises(ValueError, match=message):
        sparse_decode_attention(**given | changed)
