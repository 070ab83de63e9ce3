"""Merging forward equals kvpress's CAMPress on the same values, attention and coins, one step at a time and in batches.

Our side is the whole decode step of the policy's stage. kvpress's hook adds attention up and calls `compress`; here the
test does, on the stage's schedule, since kvpress counts its interval from the prompt and the stage from the budget.
"""

from dataclasses import replace
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
kvpress = pytest.importorskip("kvpress")

from kvx.evidence import Evidence
from kvx.parts.chance import uniforms
from kvx.parts.merge_forward import FLOW
from kvx.policies import cam
from kvx.stores.dense import Dense
from tests.kvx.policies.direct import context, softmax, tokens

pytestmark = pytest.mark.peer

HEADS, SINKS, TARGET, PROMPT, END, LAYER, SEED = 3, 4, 12, 10, 40, 2, 7


@pytest.mark.parametrize(("width", "interval"), [(1, 1), (4, 1), (32, 1), (4, 3), (2, 5)])
def test_keys_and_values_equal_those_of_kvpress(width, interval, monkeypatch):
    random = np.random.default_rng(0)
    (stage,) = cam(TARGET, width=width, sinks=SINKS, every=interval, seed=SEED).stages
    text, where = tokens(HEADS, END), context(PROMPT, layer=LAYER, layers=4, heads=HEADS)
    prompt = text.present & (jnp.arange(END) < PROMPT)
    store = Dense.pack(text, prompt, TARGET + interval)
    store = store.with_stats({FLOW: jnp.zeros(store.slots.shape, jnp.float32)})
    nobody = jnp.zeros((1, HEADS, interval), jnp.int32), jnp.full((1, HEADS, interval), -1, jnp.int32)
    state = (jnp.full((1, HEADS), TARGET, jnp.int32), jnp.full(1, SINKS, jnp.int32), jnp.ones(1, jnp.int32), nobody)

    press = kvpress.CAMPress(kvpress.StreamingLLMPress(n_sink=SINKS), interval, TARGET, 0, width)
    press.layer_step_counts[LAYER] = interval
    keys, values = (torch.from_numpy(np.array(each))[:, :, :PROMPT] for each in (text.keys, text.values))
    flow, places, coins = torch.zeros(1, HEADS, PROMPT), np.arange(PROMPT), []

    def bernoulli(probability):
        leaving = jnp.broadcast_to(jnp.asarray(places[SINKS : SINKS + interval], jnp.int32), probability.shape)
        drawn = torch.from_numpy(np.array(uniforms(SEED, jnp.int32(LAYER), leaving)))
        coins.append((drawn < probability).float())
        return coins[-1]

    monkeypatch.setattr(torch, "bernoulli", bernoulli)
    for position in range(PROMPT, END):
        places = np.append(places, position)
        row = softmax(2 * random.standard_normal((HEADS, len(places)))).astype(np.float32)

        fresh = text.take(jnp.full((1, HEADS, 1), position), jnp.ones((1, HEADS, 1), bool))
        store = store.append(replace(fresh, stats=stage.stats(fresh, None, where)))
        by_slot = np.zeros(store.slots.shape, np.float32)
        slots = np.asarray(store.slots)[0]
        for head in range(HEADS):
            for place, p in zip(places, row[head], strict=True):
                by_slot[0, head, np.flatnonzero(slots[head] == place)[0]] = p
        seen = Evidence(jnp.full(1, position + 1, jnp.int32), rows=jnp.asarray(by_slot)[:, :, None, None])
        store, (*state, waiting) = stage.step(store, state, seen, where)
        store, waiting = stage.losers.before(store, waiting, where)
        state = (*state, waiting)

        keys, values = (
            torch.cat([held, torch.from_numpy(np.array(each))[:, :, position : position + 1]], dim=2)
            for held, each in ((keys, text.keys), (values, text.values))
        )
        flow = torch.nn.functional.pad(flow, (0, 1)) + torch.from_numpy(row)[None]
        if len(places) - TARGET >= interval:
            press._running_attn_sum[LAYER] = flow
            keys, values = press.compress(SimpleNamespace(layer_idx=LAYER), None, keys, values, flow, {})
            flow = press._running_attn_sum[LAYER]
            places = np.delete(places, slice(SINKS, SINKS + interval))

        slots = np.asarray(store.slots)[0]
        for head in range(HEADS):
            occupied = np.flatnonzero(slots[head] >= 0)
            order = occupied[np.argsort(slots[head][occupied])]
            np.testing.assert_array_equal(slots[head][order], places)
            np.testing.assert_array_equal(np.asarray(store.keys)[0, head, order], keys[0, head])
            np.testing.assert_allclose(np.asarray(store.values)[0, head, order], values[0, head], atol=1e-5)
            np.testing.assert_allclose(np.asarray(store.stats[FLOW])[0, head, order], flow[0, head], atol=1e-5)
    fallen = torch.cat([coin.flatten() for coin in coins])
    assert 0 < fallen.mean() < 1, "coins of both kinds fell"
