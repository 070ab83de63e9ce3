"""Claims about fidelity: full against full is nothing, and every number is what its formula says, step by step."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import kvx
from kvx.eval.fidelity import Fidelity, fidelity
from kvx.eval.fidelity.__main__ import table
from kvx.eval.statistics import Interval
from kvx.loop import project
from kvx.policies import full, h2o, kivi, quest, streaming_llm
from tests import tiny

LAYERS, PROMPT, LENGTH = 2, 30, 62

POLICIES = {
    "full": full(),
    "evicts nothing": h2o(200),
    "evicts": h2o(16),
    "evicts more": h2o(8),
}


@pytest.fixture(scope="module")
def model():
    return tiny.model(num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def texts():
    return tiny.prompts(LENGTH, LENGTH)[0]


@pytest.fixture(scope="module")
def found(model, texts) -> dict[str, Fidelity]:
    """Every policy beside the others, in two segments of 16 steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvx.eval.fidelity.measure.SEGMENT", 16)
        measured = fidelity(model, texts, PROMPT, list(POLICIES.values()))
    assert [each.policy for each in measured] == [policy.text for policy in POLICIES.values()]
    return dict(zip(POLICIES, measured, strict=True))


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)[0]
    return logits - np.log(np.sum(np.exp(logits)))


def test_the_full_cache_against_itself_is_exactly_nothing(found):
    same = found["full"]
    np.testing.assert_array_equal(same.divergence, 0)
    np.testing.assert_array_equal(same.agreement, 1)
    np.testing.assert_array_equal(same.attention_errors, 0)
    np.testing.assert_array_equal(same.recall, 1)


def test_a_budget_that_evicts_nothing_is_the_full_cache(found):
    same = found["evicts nothing"]
    np.testing.assert_allclose(same.divergence, 0, atol=1e-6)
    np.testing.assert_allclose(same.attention_errors, 0, atol=1e-5)
    np.testing.assert_array_equal(same.recall, 1)
    np.testing.assert_allclose(same.surprisals, found["full"].surprisals, rtol=1e-4)


def test_divergence_and_perplexity_equal_the_sums_over_the_vocabulary_step_by_step(model, texts, found):
    """Segments and shared passes change nothing: one step at a time, float64, one document at a time."""
    policy, ours, forced = POLICIES["evicts"], found["evicts"], LENGTH - PROMPT
    for document in range(2):
        row, total, same, surprise = texts[document : document + 1], 0.0, 0, []
        _, whole = kvx.prefill(model, row[:, :PROMPT], full(), max_new_tokens=forced)
        _, cache = kvx.prefill(model, row[:, :PROMPT], policy, max_new_tokens=forced)
        for place in range(PROMPT, LENGTH):
            reference, whole = kvx.decode_step(model, row[:, place], whole, full())
            logits, cache = kvx.decode_step(model, row[:, place], cache, policy)
            p, q = log_softmax(reference), log_softmax(logits)
            same += p.argmax() == q.argmax()
            total += np.sum(np.exp(p) * (p - q))
            surprise += [-q[row[0, place + 1]]] if place + 1 < LENGTH else []
        assert ours.divergence[document] == pytest.approx(total / forced, rel=1e-3)
        assert ours.agreement[document] == pytest.approx(same / forced)
        np.testing.assert_allclose(ours.surprisals[document], surprise, rtol=1e-4)
        assert ours.perplexity[document] == pytest.approx(np.exp(np.mean(surprise)), rel=1e-4)
    assert ours.kl.mean > 0.001, "it evicts"
    _, cache = kvx.prefill(model, texts[:, :PROMPT], policy, max_new_tokens=forced)
    assert (ours.cache_bytes, ours.bytes_read) == (cache.nbytes // 2, cache.bytes_read() // 2)


def test_the_bytes_of_a_bfloat16_cache_are_those_of_the_full_one(model, texts, found):
    """The tiny model's cache is float32: half of it but for positions."""
    _, cache = kvx.prefill(model, texts[:, :PROMPT], full(), max_new_tokens=LENGTH - PROMPT)
    numbers = sum(store.keys.nbytes + store.values.nbytes for store in cache.layers)
    assert found["evicts"].bf16_bytes == pytest.approx((cache.nbytes - numbers / 2) / 2, rel=0.01)


def test_a_window_recalls_what_lies_in_it_and_errs_by_what_does_not():
    """One layer, so that no stream comes apart: the full run's most attended, asked of a window by hand."""
    one, sinks, budget, most, start, end = tiny.model(num_hidden_layers=1), 2, 16, 8, 20, 50
    texts, _ = tiny.prompts(end)
    (found,) = fidelity(one, texts, start, [streaming_llm(budget, sinks=sinks, renumber=False)], most=most)
    heads, hits, squares, sizes = attention_map(one, texts), 0, 0.0, 0.0
    for place in range(start, end):
        # The step before left its budget; the query's own token comes on top.
        held = {*range(sinks), *range(place - (budget - sinks), place + 1)}
        for rows, values in heads:
            row = rows[place, : place + 1]
            hits += len(held & set(np.argsort(-row)[:most].tolist()))
            kept = np.where(np.isin(np.arange(place + 1), list(held)), row, 0)
            true, short = row @ values[: place + 1], (kept / kept.sum()) @ values[: place + 1]
            squares += np.sum((true - short) ** 2)
            sizes += np.sum(true**2)
    assert found.recall[0] == pytest.approx(hits / ((end - start) * most * len(heads)), abs=1e-9)
    assert 0.3 < found.recall[0] < 1
    assert found.attention_errors[0, 0] == pytest.approx(np.sqrt(squares / sizes), rel=1e-3)


def attention_map(model, texts):
    """(T, T) probabilities and (T, V) values of every query head of a model of one layer."""
    (block,) = model.blocks
    positions = jnp.arange(texts.shape[1], dtype=jnp.int32)[None]
    query, tokens = project(block, model.embed(jnp.asarray(texts)), positions)
    queries, keys = np.asarray(query.rotated, np.float64)[0], np.asarray(tokens.rotated_keys, np.float64)[0]
    logits = np.einsum("grtd,gsd->grts", queries, keys) * block.spec.scale
    logits = np.where(np.tril(np.ones(logits.shape[-2:], bool)), logits, -np.inf)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    values = np.asarray(tokens.values, np.float64)[0]
    return [(weights[group, head], values[group]) for group in range(len(keys)) for head in range(queries.shape[1])]


def test_without_a_look_at_attention_the_distributions_are_the_same(model, texts, found):
    (bare,) = fidelity(model, texts, PROMPT, [POLICIES["evicts"]], most=0)
    np.testing.assert_allclose(bare.divergence, found["evicts"].divergence, rtol=1e-3)
    np.testing.assert_allclose(bare.surprisals, found["evicts"].surprisals, rtol=1e-4)
    assert set(bare.measures()) == {"agreement", "perplexity"}
    assert "layers" not in bare.as_json(bins=2)


@pytest.mark.slow
def test_codes_hold_every_token_and_err_all_the_same(model, texts):
    (codes,) = fidelity(model, texts, PROMPT, [kivi(bits=2, group=16, residual=16)])
    np.testing.assert_array_equal(codes.recall, 1)
    assert (codes.attention_errors > 0.001).all()


def test_what_a_sparse_read_leaves_out_is_not_recalled_though_it_is_held():
    one = tiny.model(num_hidden_layers=1)
    (sparse,) = fidelity(one, tiny.prompts(LENGTH, LENGTH)[0], PROMPT, [quest(16, page=8, skip=())])
    assert (sparse.recall < 0.95).all()
    assert (sparse.recall > 16 / LENGTH).all(), "it reads the pages that promise most"


def test_larger_budgets_err_less_in_every_measure(found):
    small, large = found["evicts more"], found["evicts"]
    assert large.kl.mean < small.kl.mean
    assert large.recall.mean() > small.recall.mean()
    assert large.attention_error.mean() < small.attention_error.mean()


def test_heads_add_up_to_their_layer(found):
    ours = found["evicts"]
    assert [heads.shape for heads in ours.head_errors] == [(4,)] * LAYERS
    for layer, (errors, sizes) in enumerate(zip(ours.head_errors, ours.sizes, strict=True)):
        assert np.sum(errors**2 * sizes.sum(axis=0)) == pytest.approx(ours.distances[layer].sum())
    assert np.mean(ours.head_recalls) == pytest.approx(ours.recall.mean())


def test_stretches_of_the_text_average_to_the_whole(found):
    ours = found["evicts"]
    stretches = ours.by_position(3)
    assert [(each.first, each.last) for each in stretches] == [(30, 39), (40, 49), (50, 60)]
    steps = [each.last - each.first + 1 for each in stretches]
    surprise = np.average([np.log(each.perplexity) for each in stretches], weights=steps)
    assert surprise == pytest.approx(ours.surprisals.mean())
    divergence = np.average([each.divergence for each in stretches], weights=steps)
    assert divergence == pytest.approx(ours.divergences[:, :-1].mean())
    assert len(ours.by_position(1000)) == 31


def test_pairing_is_by_document(found):
    close, far = found["evicts"], found["evicts more"]
    assert close.less_than(far) == Interval.of(far.divergence - close.divergence)


def test_table_and_json_tell_what_was_found(found):
    measured = list(found.values())
    assert table(measured).row_count == len(POLICIES)
    ours = json.loads(json.dumps(found["evicts"].as_json(bins=3), allow_nan=False))
    assert ours["kl"]["mean"] == pytest.approx(found["evicts"].divergence.mean())
    assert np.shape(ours["head_errors"]) == np.shape(ours["head_recalls"]) == (LAYERS, 4)
    assert len(ours["by_position"]) == 3 and len(ours["layers"]) == LAYERS


def test_what_cannot_be_measured_is_refused(model, texts):
    with pytest.raises(kvx.BadInput, match="prompt=61 of documents of 62 tokens; allowed: 1 to 60"):
        fidelity(model, texts, LENGTH - 1, [full()])
    with pytest.raises(kvx.BadInput, match="most=-1"):
        fidelity(model, texts, PROMPT, [full()], most=-1)
