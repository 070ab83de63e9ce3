"""Claims about the layouts of the dense store: slots last, for a TPU's lanes, is the same store under every verb."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvx
from kvx.kernels.implementations import compiling_for
from kvx.stores.dense import Dense
from tests.kvx.policies import direct
from tests.kvx.stores.one_layer import query, tokens

CAPACITY = 20
POSITIONS = [[*range(12), -1, -1], [*range(5), *[-1] * 9]]


def both(**stats):
    """Two rows of tokens, one of them shorter, packed with slots second to last and last."""
    these = tokens(POSITIONS, **stats)
    return tuple(Dense.pack(these, these.present, CAPACITY, slots_last=slots_last) for slots_last in (False, True))


def one_more(at, seed=5):
    return tokens(np.asarray(at)[:, None], seed=seed)


SLOT = jnp.asarray([[3, 7], [0, 4]])
WHEN = jnp.asarray([[True, False], [True, True]])
VERBS = {
    "as packed": lambda store: store,
    "append": lambda store: store.append(one_more([12, 5])),
    "append several": lambda store: store.append(tokens([[12, 13, 14], [5, 6, -1]], seed=6)),
    "append nothing": lambda store: store.append(one_more([-1, -1])),
    "evict and append": lambda store: store.evict(SLOT, WHEN).append(one_more([12, 5])),
    "release": lambda store: store.release(jnp.cumsum(store.slots, axis=-1) * 1.0, jnp.full((2, 2), 2), 2),
    "crop": lambda store: store.crop(jnp.asarray([7, 3])),
    "move": lambda store: store.move(jnp.where(store.slots >= 4, store.slots + 3, store.slots)),
    "write": lambda store: store.write(SLOT, one_more([3, 0]), WHEN),
    "write values": lambda store: store.write_values(SLOT[..., None], one_more([1, 1]).values),
}  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_slots_last_is_the_same_store(verb):
    first, last = (jax.jit(VERBS[verb])(store) for store in both())
    # What lies behind the slots that were asked for is empty.
    assert last.slots.shape[-1] == last.keys.shape[-1] == 128 and jnp.all(last.slots[..., CAPACITY:] < 0)
    held, also = first.tokens(), last.tokens()
    np.testing.assert_array_equal(held.positions, also.positions[..., :CAPACITY])
    seen = np.asarray(held.present)
    for name in ("keys", "values"):
        whole = np.asarray(getattr(also, name))[:, :, :CAPACITY]
        np.testing.assert_array_equal(np.asarray(getattr(held, name))[seen], whole[seen])
    asked = query([[20], [20]])
    parts = [store.read(asked) for store in (first, last)]
    np.testing.assert_allclose(parts[0].out, parts[1].out, atol=3e-6)
    np.testing.assert_allclose(parts[0].lse, parts[1].lse, atol=3e-6)
    chances = [store.probabilities(asked, parts[0].lse) for store in (first, last)]
    np.testing.assert_allclose(chances[0], chances[1][..., :CAPACITY], atol=1e-6)
    assert not jnp.any(chances[1][..., CAPACITY:])


def test_statistics_travel_with_either_layout():
    mass = np.arange(2 * 2 * 14).reshape(2, 2, 14)
    for store in both(mass=mass):
        fresh = replace(one_more([12, 5]), stats={"mass": jnp.full((2, 2, 1), 99.0)})
        found = store.append(fresh).stats["mass"]
        assert float(found[0, 0, 12]) == float(found[1, 1, 5]) == 99
        np.testing.assert_array_equal(found[0, :, :12], mass[0, :, :12])


def test_what_is_traced_for_a_tpu_has_narrow_heads_slots_last_and_wide_ones_as_they_are():
    policy = kvx.policies.full()
    for width, narrow in ((64, True), (128, False), (256, False)):
        these = direct.tokens(1, 12, width)
        stores = {}
        for platform in ("tpu", "gpu", "cpu"):
            with compiling_for(platform):
                stores[platform] = policy.pack(these, these.present, direct.evidence(12), direct.context(12), 20)
        assert [store.slots_last for store in stores.values()] == [narrow, False, False]
        held, plain = (stores[platform].dense() for platform in ("tpu", "cpu"))
        for one, other in zip(held, plain, strict=True):
            np.testing.assert_array_equal(one[:, :, :20], other)
