"""Claims about sink measurements: they equal sums over whole maps, and known maps have known sinks."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

import kvx
from kvx.decoder import AttentionSpec
from kvx.eval.heads.sinks import Sinks, attention_sinks, sink_rows
from kvx.kernels.prefill_attention import prefill_attention
from kvx.kernels.prefill_attention.columns import SUM
from kvx.loop import project
from kvx.query import Query
from kvx.rotary import Rotary
from tests import tiny, tiny_latent

T = 30
HARMONIC = np.sum(1 / np.arange(1, 65))


def sinks_of(alpha, length):
    """Measures whose alpha is given by layer, and nothing else is."""
    texts = len(alpha[0]) if alpha else 1
    return Sinks(0, tuple(alpha), np.ones((2, texts, length)), (), (), (), (), ())


def alpha_of(logits):
    """alpha of one head whose logits are given, by the code that serves models: queries are one-hot rows of them."""
    length = len(logits)
    queries = jnp.asarray(logits, jnp.float32)[None, None, None]
    keys = jnp.eye(length)[None, None]
    spots = jnp.arange(length, dtype=jnp.int32)[None]
    sums = prefill_attention(queries, keys, keys, spots, spots[None], scale=1.0, columns=(SUM,))[2][SUM][0, 0, 0]
    return np.asarray(sums) / (length - np.arange(length))


def maps(model, texts):
    """For each layer and query head of the first text: logits (T, T), probabilities, and the residual stream."""
    positions = jnp.arange(texts.shape[1], dtype=jnp.int32)[None]
    x, found = model.embed(jnp.asarray(texts)[:1]), []
    for block in model.blocks:
        form = block.expanded
        query, tokens = project(form, x, positions)
        q, k, v = (np.asarray(each, np.float64)[0] for each in (query.rotated, tokens.rotated_keys, tokens.values))
        logits = form.spec.scale * np.einsum("grtd,gsd->grts", q, k).reshape(form.spec.heads, len(q[0, 0]), -1)
        seen = np.tril(np.ones(logits.shape[1:], bool))
        weights = np.where(seen, np.exp(logits - logits.max(axis=-1, keepdims=True)), 0)
        weights /= weights.sum(axis=-1, keepdims=True)
        values = np.repeat(v, form.spec.group, axis=0)
        out = jnp.asarray(np.einsum("hts,hsv->thv", weights, values)[None], jnp.float32)
        x = form.finish(x, out)
        found.append((logits, weights, values, k, np.asarray(x, np.float64)[0], form))
    return found


@pytest.mark.parametrize("kind, sink", [("grouped", 0), ("latent", 3)])
def test_measures_equal_those_of_whole_maps(kind, sink):
    model = tiny.model(num_hidden_layers=2) if kind == "grouped" else tiny_latent.model()
    texts, _ = tiny.prompts(T, T)
    found = attention_sinks(model, texts, sink=sink)
    for layer, (logits, weights, values, keys, x, form) in enumerate(maps(model, texts)):
        alpha = weights.sum(axis=1) / (T - np.arange(T))
        np.testing.assert_allclose(found.alpha[layer][0], alpha, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(found.masses[layer][0], weights[:, sink + 1 :, sink].mean(axis=1), rtol=1e-3)
        gaps = [logits[:, n, sink] - logits[:, n, sink + 1 : n].mean(axis=1) for n in range(sink + 2, T)]
        np.testing.assert_allclose(found.gaps[layer][0], np.mean(gaps, axis=0), rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(found.hidden[layer + 1, 0], np.linalg.norm(x, axis=-1), rtol=1e-3)
        for head in range(form.spec.heads):
            alone = np.zeros((1, T, form.spec.heads, values.shape[-1]), np.float32)
            alone[0, :, head] = values[head]
            drains = np.linalg.norm(form.attention.output(jnp.asarray(alone), jnp.float32)[0], axis=-1)
            np.testing.assert_allclose(found.drains[layer][0, head], drains, rtol=1e-3)
        if kind == "grouped":
            np.testing.assert_allclose(found.keys[layer][0], np.linalg.norm(keys, axis=-1), rtol=1e-3)
            repeated = np.repeat(found.values[layer][0], form.spec.group, axis=0)
            np.testing.assert_allclose(repeated, np.linalg.norm(values, axis=-1), rtol=1e-3)


def test_what_all_tokens_receive_is_what_all_queries_give():
    """sum_k (T - k) alpha_k = T for every head: each query gives away 1."""
    found = attention_sinks(tiny.model(num_hidden_layers=2), tiny.prompts(T, T)[0])
    for layer in found.alpha:
        np.testing.assert_allclose((layer * (T - np.arange(T))).sum(axis=-1), T, rtol=1e-5)


def test_a_head_parked_on_the_first_token_is_a_full_sink():
    alpha = alpha_of(np.where(np.arange(64) == 0, 200.0, 0.0) * np.ones((64, 1)))
    np.testing.assert_allclose(alpha, np.arange(64) == 0, atol=1e-6)
    assert sinks_of([alpha[None, None]], 64).rate() == 100
    assert sinks_of([alpha[None, None]], 64).rate(token=1) == 0


def test_a_head_that_looks_at_itself_gives_each_token_one_query():
    alpha = alpha_of(200.0 * np.eye(64))
    np.testing.assert_allclose(alpha, 1 / (64 - np.arange(64)), rtol=1e-4)


def test_attention_spread_evenly_gives_the_first_token_a_harmonic_share():
    alpha = alpha_of(np.zeros((64, 64)))
    assert alpha[0] == pytest.approx(HARMONIC / 64, rel=1e-5) and alpha[0] == pytest.approx(0.0741, abs=1e-4)
    assert sinks_of([alpha[None, None]], 64).rate() == 0


def test_a_rate_that_even_attention_reaches_is_refused():
    short = sinks_of([np.ones((1, 1, 9))], 9)
    with pytest.raises(kvx.BadInput, match=r"above=0.3 at 9 tokens, where token 0 receives 0.314"):
        short.rate()
    assert short.rate(above=0.4) == 100
    with pytest.raises(kvx.BadInput, match="token=9 of texts of 9 tokens; allowed: 0 to 8"):
        short.rate(token=9)


def test_rates_are_shares_of_heads_over_texts_and_layers():
    first, second = np.zeros((2, 2, 64)), np.zeros((2, 3, 64))
    first[0, 1, 0] = second[1, :, 0] = 0.5
    assert sinks_of([first, second], 64).rate() == pytest.approx(100 * 4 / 10)
    assert sinks_of([first, second], 64).rate(above=0.6) == 0


@pytest.mark.parametrize("window, softcap", [(None, None), (9, 2.0)])
def test_gaps_and_masses_in_blocks_equal_those_of_the_whole(window, softcap, monkeypatch):
    random = np.random.default_rng(0)
    spec = AttentionSpec(4, 2, 8, 8, 0.5, window, softcap)
    raw = jnp.asarray(random.normal(size=(1, 2, 2, 23, 8)), jnp.float32)
    keys = jnp.asarray(random.normal(size=(1, 2, 23, 8)), jnp.float32)
    query = Query(raw, jnp.arange(23, dtype=jnp.int32)[None], Rotary(jnp.zeros(4), 1.0), spec)
    logits = np.einsum("grtd,gsd->grts", *(np.asarray(each, np.float64)[0] for each in (raw, keys))).reshape(4, 23, 23)
    logits *= 0.5
    logits = logits if softcap is None else softcap * np.tanh(logits / softcap)
    distance = np.arange(23)[:, None] - np.arange(23)
    logits = np.where((distance >= 0) & (distance < (window or 99)), logits, -np.inf)
    weights = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    queries = range(4, min(23, 2 + (window or 99)))
    gaps = np.mean([logits[:, n, 2] - logits[:, n, 3:n].mean(axis=-1) for n in queries], axis=0)
    for size in (4, 128):
        monkeypatch.setattr("kvx.eval.heads.sinks.QUERIES", size)
        found = sink_rows(query, keys, 2)
        np.testing.assert_allclose(found[0][0], gaps, rtol=1e-4)
        np.testing.assert_allclose(found[1][0], weights[:, 3:, 2].mean(axis=1), rtol=1e-4)


def test_ratios_are_to_the_mean_of_the_others_and_peaks_to_the_largest():
    hidden = np.asarray([[[1.0, 1, 1]], [[8.0, 2, 4]]])
    found = replace(
        sinks_of([], 3),
        hidden=hidden,
        **{name: (np.asarray([[[1.0, 2, 6]]]),) for name in ("keys", "values", "drains")},
    )
    assert found.against_the_rest()["hidden"].tolist() == [1, pytest.approx(8 / 3)]
    assert found.against_the_rest()["keys"].tolist() == [0.25]
    assert found.peaks.tolist() == [2]


@pytest.mark.parametrize("sink, message", [(28, "sink=28 of texts of 30 tokens; allowed: 0 to 27"), (-1, "sink=-1")])
def test_a_sink_without_queries_after_it_is_refused(sink, message):
    with pytest.raises(kvx.BadInput, match=message):
        attention_sinks(tiny.model(num_hidden_layers=2), tiny.prompts(T)[0], sink=sink)
