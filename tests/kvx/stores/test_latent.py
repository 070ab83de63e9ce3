"""Latent attention in the cache: one row a token, whatever keeps it, and codes for its latent."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvx
from kvx.loop import project
from kvx.query import Query
from kvx.stores.coded import Code
from kvx.stores.coded_latent import CodedLatent
from kvx.stores.dense import Dense
from kvx.stores.flat import Flat
from kvx.stores.mean_token import MeanSlot
from kvx.stores.paged import Paged
from kvx.stores.pages import Pages, pages_for
from kvx.stores.pooled import Pool, Pooled
from kvx.stores.renumbered import Renumbered
from kvx.tokens import Tokens
from tests import tiny, tiny_latent

ROTARY, RANK, LENGTH = 16, 32, 21


def layer() -> tuple[Query, Tokens]:
    """The queries of the last of 21 tokens, and all of them, two rows."""
    model = tiny_latent.model()
    x = model.embed(jnp.asarray(tiny.prompts(LENGTH, LENGTH)[0]))
    positions = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), (2, LENGTH))
    # Compiled, as the layer loop does it: the rotation's magnitude becomes an array.
    query, tokens = jax.jit(project)(model.blocks[0], x, positions)
    last = Query(query.raw[:, :, :, -1:], positions[:, -1:], query.rotary, query.spec)
    return last, tokens.with_form(rotated=True)


def stores(tokens: Tokens) -> dict:
    """Everything that can hold latent rows, holding all of these."""
    mask = jnp.ones(tokens.positions.shape, bool)
    whole = jnp.full(2, LENGTH, jnp.int32)
    pages = int(jnp.sum(pages_for(jnp.full((2, 1), LENGTH), 8, 8)))
    pool = Pool.empty(tokens, 64)
    return {
        "dense": Dense.pack(tokens, mask, 32),
        "flat": Flat.pack(tokens, mask, 32),
        "pooled": Pooled.pack(tokens, mask, pool, jnp.asarray([0, 9]), whole + 4, 32),
        "paged": Paged.pack(tokens, mask, 32, page=8, budget=jnp.full(2, 4), most=4),
        "pages": Pages.pack(tokens, mask, pages, page=8, longest=LENGTH, room=8),
        "renumbered": Renumbered.pack(tokens, mask, 32),
        "coded": CodedLatent.pack(tokens, mask, 32, code=Code(8)),
    }


def expected(query: Query, tokens: Tokens) -> tuple[np.ndarray, np.ndarray]:
    """Output and log-sum-exp of every head by float64 loops over [rotary key ; latent]."""
    queries, keys = np.asarray(query.rotated, np.float64), np.asarray(tokens.keys, np.float64)
    logits = query.spec.scale * np.einsum("bgrtd,bgsd->bgrts", queries, keys)
    weights = np.exp(logits)
    out = np.einsum("bgrts,bgsv->bgrtv", weights, keys[..., ROTARY:]) / weights.sum(-1)[..., None]
    return out, np.log(weights.sum(-1))


LONGER = [pytest.param(name, marks=pytest.mark.slow) for name in ("flat", "pooled", "paged", "pages", "renumbered")]


@pytest.mark.parametrize("name", ["dense", "coded", *LONGER])
def test_every_store_reads_latents_as_values_and_takes_a_token(name):
    query, tokens = layer()
    store = stores(tokens)[name]
    # Codes of 8 bits are right to half a step of the latent's range over 255.
    tolerance = 2e-2 if name == "coded" else 1e-5
    out, lse = expected(query, tokens)
    np.testing.assert_allclose(store.read(query).out, out, atol=tolerance)
    np.testing.assert_allclose(store.read(query).lse, lse, atol=tolerance)
    chances = np.asarray(store.probabilities(query, store.read(query).lse))
    np.testing.assert_allclose(chances.sum(-1), 1, atol=1e-5)
    keys, values, _ = store.dense()
    assert keys.shape[-1] == ROTARY + RANK and values.shape[-1] == RANK
    np.testing.assert_array_equal(values, keys[..., ROTARY:])
    assert store.tokens().values.shape[-1] == 0, "and nothing is kept twice"
    fresh = Tokens(tokens.keys[:, :, :1], tokens.values[:, :, :1], jnp.full((2, 1, 1), LENGTH), tokens.rotary)
    more = store.append(fresh)
    held = np.sort(np.asarray(more.positions()), axis=-1)[:, 0, -LENGTH - 1 :]
    np.testing.assert_array_equal(held, np.broadcast_to(np.arange(LENGTH + 1), held.shape))


def test_the_mean_of_rows_is_the_mean_of_their_values():
    query, tokens = layer()
    mean = MeanSlot.pack(tokens, jnp.ones(tokens.positions.shape, bool))
    np.testing.assert_allclose(
        mean.read(query).out[:, 0, 0, 0], np.asarray(tokens.keys)[:, 0, :, ROTARY:].mean(1), atol=1e-6
    )


def test_bytes_are_those_of_one_row_a_token():
    """(r + p) numbers and a position for every slot, and nothing else but the rotation."""
    model = tiny_latent.model(latent=(0, 2))
    _, cache = kvx.prefill(model, tiny.prompts(100, 100)[0], kvx.policies.full(), max_new_tokens=28)
    for index, store in enumerate(cache.layers):
        slots = store.positions().shape[-1]
        kv_heads, width = (1, ROTARY + RANK) if index in (0, 2) else (2, 2 * 32)
        rotation = sum(leaf.nbytes for leaf in jax.tree.leaves(store.rotary))
        assert kvx.cache.nbytes(store) == 2 * kv_heads * slots * (4 * width + 4) + rotation
        assert slots == 256


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_are_near_their_latents_and_rotary_keys_exact(bits):
    _, tokens = layer()
    mask = jnp.ones(tokens.positions.shape, bool)
    store = CodedLatent.pack(tokens, mask, 32, code=Code(bits, 16))
    keys = np.asarray(store.tokens().keys)[:, :, :LENGTH]
    exact = np.asarray(tokens.keys)
    np.testing.assert_array_equal(keys[..., :ROTARY], exact[..., :ROTARY])
    groups = exact[..., ROTARY:].reshape(2, 1, LENGTH, 2, 16)
    # Half a step, of a scale that is rounded up in bfloat16 from a minimum that is rounded down.
    step = (np.ptp(groups, axis=-1) + np.abs(groups.min(-1)) * 2**-7) * (1 + 2**-7) / (2**bits - 1)
    assert (np.abs(keys[..., ROTARY:].reshape(groups.shape) - groups) <= step[..., None] / 2 + 1e-6).all()
    rotation = sum(leaf.nbytes for leaf in jax.tree.leaves(store.rotary))
    assert store.bytes_read() == 2 * 32 * (4 * ROTARY + RANK * bits // 8 + 4 * 2 + 4) + rotation


def test_a_coded_token_is_never_coded_again():
    """Reading, appending and evicting leave the codes of other slots as they are."""
    _, tokens = layer()
    store = CodedLatent.pack(tokens, jnp.ones(tokens.positions.shape, bool), 32, code=Code(2))
    fresh = Tokens(tokens.keys[:, :, :3], tokens.values[:, :, :3], jnp.full((2, 1, 3), LENGTH), tokens.rotary)
    after = store.append(fresh).release(jnp.zeros((2, 1, 32)), jnp.ones((2, 1), jnp.int32))
    np.testing.assert_array_equal(after.latents.words[..., :LENGTH], store.latents.words[..., :LENGTH])
    assert (np.asarray(after.positions()) >= 0).sum() == 2 * (LENGTH + 2)


@pytest.mark.parametrize(
    "text", ["d2o(budget=32, skip=(0,))", "cam(budget=32)", "kivi(bits=4)", "mikv(high=32)", "minicache()"]
)
def test_policies_that_treat_values_apart_refuse_latent_layers(text):
    model = tiny_latent.model(latent=(1,))
    with pytest.raises(kvx.BadInput, match=r"policy=.* treats values apart from keys, but in layer 1 .*; allowed: "):
        kvx.prefill(model, tiny.prompts(40)[0], kvx.parse_policy(text))


def test_what_cannot_be_coded_is_refused():
    tokens = tiny.prompts(40)[0]
    with pytest.raises(kvx.BadInput, match="no layer of the model has latent attention; allowed: a model that has"):
        kvx.prefill(tiny.model(num_hidden_layers=3), tokens, kvx.policies.latent_codes())
    with pytest.raises(kvx.BadInput, match="group=12 does not divide latents of 32 channels"):
        kvx.prefill(tiny_latent.model(), tokens, kvx.policies.latent_codes(group=12))
    with pytest.raises(
        kvx.BadInput, match="one pool, but their tokens differ in width; allowed: models of layers alike"
    ):
        kvx.prefill(tiny_latent.model(latent=(1,)), tokens, kvx.policies.cake(budget=32, window=8))
    with pytest.raises(kvx.BadInput, match="but their heads differ; allowed: models of layers alike"):
        kvx.prefill(tiny_latent.model(latent=(1,)), tokens, kvx.policies.tidaldecode(budget=32, layers=(0,)))
    with pytest.raises(kvx.BadInput, match="bits=5"):
        kvx.policies.latent_codes(bits=5)
