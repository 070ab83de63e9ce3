"""Claims about layouts: however keys and values lie in memory, for a TPU's lanes or not, a store is the same."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvx
from kvx.kernels.implementations import compiling_for
from kvx.stores.dense import Dense
from kvx.stores.flat import Flat
from kvx.stores.layout import APART, SLOTS_LAST, SideBySide, layout_for
from kvx.stores.paged import Paged
from kvx.stores.pages import Pages
from kvx.stores.renumbered import Renumbered
from tests.kvx.policies import direct
from tests.kvx.stores import test_latent
from tests.kvx.stores.one_layer import HEADS, WIDTH, query, tokens

CAPACITY = 20
POSITIONS = [[*range(12), -1, -1], [*range(5), *[-1] * 9]]


LAYOUTS = {"slots last": SLOTS_LAST, "side by side": SideBySide(WIDTH)}


def both(layout, **stats):
    """Two rows of tokens, one of them shorter, packed with rows apart and in another layout."""
    these = tokens(POSITIONS, **stats)
    return tuple(Dense.pack(these, these.present, CAPACITY, layout=layout) for layout in (APART, layout))


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
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_the_same_store(name, verb):
    plain, other = (jax.jit(VERBS[verb])(store) for store in both(LAYOUTS[name]))
    if name == "slots last":
        # What lies behind the slots that were asked for is empty.
        assert other.slots.shape[-1] == other.keys.shape[-1] == 128 and jnp.all(other.slots[..., CAPACITY:] < 0)
    else:
        assert other.keys.shape[-2:] == (CAPACITY, 2 * WIDTH) and other.values.size == 0
    held, also = plain.tokens(), other.tokens()
    np.testing.assert_array_equal(held.positions, also.positions[..., :CAPACITY])
    seen = np.asarray(held.present)
    for part in ("keys", "values"):
        whole = np.asarray(getattr(also, part))[:, :, :CAPACITY]
        np.testing.assert_array_equal(np.asarray(getattr(held, part))[seen], whole[seen])
    reads_the_same(plain, other)


def reads_the_same(plain, other):
    """Output, log-sum-exp and probabilities; float32 sums in another order."""
    asked = query([[20], [20]])
    parts = [store.read(asked) for store in (plain, other)]
    np.testing.assert_allclose(parts[0].out, parts[1].out, atol=3e-6)
    np.testing.assert_allclose(parts[0].lse, parts[1].lse, atol=3e-6)
    chances = [np.asarray(store.probabilities(asked, parts[0].lse)) for store in (plain, other)]
    slots = chances[0].shape[-1]
    np.testing.assert_allclose(chances[0], chances[1][..., :slots], atol=1e-6)
    assert not np.any(chances[1][..., slots:])


@pytest.mark.parametrize("name", LAYOUTS)
def test_statistics_travel_with_every_layout(name):
    mass = np.arange(2 * 2 * 14).reshape(2, 2, 14)
    for store in both(LAYOUTS[name], mass=mass):
        fresh = replace(one_more([12, 5]), stats={"mass": jnp.full((2, 2, 1), 99.0)})
        found = store.append(fresh).stats["mass"]
        assert float(found[0, 0, 12]) == float(found[1, 1, 5]) == 99
        np.testing.assert_array_equal(found[0, :, :12], mass[0, :, :12])


def test_which_layout_a_platform_wants():
    """Slots last where rows do not fill a TPU's lanes; side by side where it must be rows and two fill them."""
    wanted = {
        # width: (for slots, for pages and runs)
        32: (SLOTS_LAST, APART),
        64: (SLOTS_LAST, SideBySide(64)),
        128: (APART, APART),
        192: (SLOTS_LAST, SideBySide(192)),
        256: (APART, APART),
    }
    for width, layouts in wanted.items():
        these = direct.tokens(1, 12, width)
        for platform in ("gpu", "cpu"):
            with compiling_for(platform):
                assert {layout_for(these), layout_for(these, by_rows=True)} == {APART}
        with compiling_for("tpu"):
            assert (layout_for(these), layout_for(these, by_rows=True)) == layouts
    latents = test_latent.layer()[1]
    with compiling_for("tpu"):
        assert (layout_for(latents), layout_for(latents, by_rows=True)) == (SLOTS_LAST, APART)


def test_a_policy_packs_what_the_platform_wants():
    policy = kvx.policies.full()
    these = direct.tokens(1, 12, 64)
    stores = {}
    for platform in ("tpu", "cpu"):
        with compiling_for(platform):
            stores[platform] = policy.pack(these, these.present, direct.evidence(12), direct.context(12), 20)
    assert [store.layout for store in stores.values()] == [SLOTS_LAST, APART]
    for one, other in zip(*(store.dense() for store in stores.values()), strict=True):
        np.testing.assert_array_equal(one[:, :, :20], other)


def wide(these):
    """Heads of 64, which lie side by side on a TPU: twice the channels of `one_layer`, whose others are zero."""
    pad = [(0, 0)] * 3 + [(0, 64 - WIDTH)]
    return replace(these, keys=jnp.pad(these.keys, pad), values=jnp.pad(these.values, pad))


def pages(these, mask):
    return Pages.pack(these, mask, 2 * HEADS * 6, page=4, longest=14, room=8)


def paged(these, mask):
    return Paged.pack(these, mask, CAPACITY, page=4, budget=jnp.full(2, 3), most=3)


@pytest.mark.parametrize(("platform", "slots"), [("tpu", 128), ("cpu", 20)])
def test_positions_of_pages_fill_lanes_where_a_tpu_copies_them(platform, slots):
    with compiling_for(platform):
        assert paged(wide(tokens(POSITIONS)), tokens(POSITIONS).present).inner.slots.shape[-1] == slots


BY_ROWS = {
    "pages": pages,
    "paged": paged,
    "closed run": lambda these, mask: Flat.pack(these, mask, 64, closed=True),
    "renumbered": lambda these, mask: Renumbered.pack(these, mask, CAPACITY),
}


@pytest.mark.parametrize("name", BY_ROWS)
def test_a_store_packed_for_a_tpu_is_the_one_packed_for_a_cpu(name):
    """Before and after a token more; a closed run takes none. Queries of zeros where the added channels are."""
    these = wide(tokens(POSITIONS))
    mask = these.present & ~((jnp.arange(HEADS)[:, None] == 1) & (these.positions % 3 == 1))
    with compiling_for("tpu"):
        turned = BY_ROWS[name](these, mask)
    plain = BY_ROWS[name](these, mask)
    assert jax.tree.structure(plain) != jax.tree.structure(turned), "another layout"
    steps = [lambda store: store]
    if name != "closed run":
        steps.append(lambda store: store.append(wide(one_more([12, 5]))))
    for step in steps:
        one, other = step(plain), step(turned)
        slots = one.positions().shape[-1]
        np.testing.assert_array_equal(one.positions(), other.positions()[..., :slots])
        present = np.asarray(one.positions()) >= 0
        for mine, theirs in zip(one.dense()[:2], other.dense()[:2], strict=True):
            np.testing.assert_array_equal(np.asarray(mine)[present], np.asarray(theirs)[:, :, :slots][present])
        asked = query([[20], [20]])
        raw = jnp.pad(asked.raw, [(0, 0)] * 4 + [(0, 64 - WIDTH)])
        asked = replace(asked, raw=raw, spec=replace(asked.spec, key_dim=64, value_dim=64))
        parts = [store.read(asked) for store in (one, other)]
        np.testing.assert_allclose(parts[0].out, parts[1].out, atol=3e-6)  # float32 in another order
        np.testing.assert_allclose(parts[0].lse, parts[1].lse, atol=3e-6)
        chances = [np.asarray(store.probabilities(asked, parts[0].lse))[..., :slots] for store in (one, other)]
        np.testing.assert_allclose(*chances, atol=1e-6)


def test_latents_with_their_slots_last_are_the_same_latents():
    asked, these = test_latent.layer()
    stores = [Dense.pack(these, these.present, 32, layout=layout) for layout in (APART, SLOTS_LAST)]
    fresh = replace(
        these.take(jnp.zeros((2, 1, 1), jnp.int32), jnp.ones((2, 1, 1), bool)), positions=these.positions[..., -1:] + 1
    )
    for step in (lambda store: store, lambda store: store.append(fresh)):
        one, other = (step(store) for store in stores)
        parts = [store.read(asked) for store in (one, other)]
        np.testing.assert_allclose(parts[0].out, parts[1].out, atol=1e-6)
        np.testing.assert_allclose(parts[0].lse, parts[1].lse, atol=1e-6)
        np.testing.assert_array_equal(one.tokens().keys, other.tokens().keys[:, :, :32])
