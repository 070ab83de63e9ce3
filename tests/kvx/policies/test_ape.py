"""Claims about APE (Yang et al. 2025): sequential and union identities, its closed form in float64, labels, batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvx
from kvx import policies
from kvx.kernels.merge_partials import merge_partials
from kvx.stores.dense import Dense
from kvx.stores.tempered import Tempered
from tests import tiny
from tests.kvx.policies.direct import softmax
from tests.kvx.stores.one_layer import SPEC, attention, query, tokens

PLAIN = policies.ape(temperature=1.0, scale=1.0)


@pytest.fixture(scope="module")
def model():
    return tiny.model(num_hidden_layers=3)


def texts(*lengths: int, seed: int = 0) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(0, 97, length).tolist() for length in lengths]


def ask(model, policy, prefix, contexts, question):
    """Logits after the question, and the cache."""
    prompt = kvx.labelled_prompt([prefix], [contexts])
    _, cache = kvx.prefill(model, prompt.tokens, policy, prompt.lengths, labels=prompt.labels)
    return kvx.prefill(model, np.asarray([question]), policy, cache=cache)


@pytest.mark.slow
def test_one_context_without_temperature_and_scale_is_sequential_encoding(model):
    prefix, context, question = texts(5, 21, 6)
    logits, cache = ask(model, PLAIN, prefix, [context], question)
    full, _ = kvx.prefill(model, np.asarray([prefix + context + question]), policies.full())
    np.testing.assert_allclose(logits, full, atol=2e-5)
    assert cache.next.tolist() == [32]


class Brute:
    """Contexts encoded one by one, then every query's attention by the paper's two softmaxes, float64."""

    def __init__(self, model, prefix, contexts, temperature, scale):
        self.model, self.temperature, self.scale = model, temperature, scale
        layers = len(model.blocks)
        self.contexts = [[] for _ in range(layers)]
        prefix_rows = self._alone(prefix, 0)
        self.others = [[rows] for rows in prefix_rows]
        for context in contexts:
            for layer, (k, v) in enumerate(self._alone(prefix + context, 0)):
                self.contexts[layer].append((k[:, len(prefix) :], v[:, len(prefix) :]))
        self.next = len(prefix) + max(map(len, contexts))

    def step(self, token):
        x = self.model.embed(jnp.asarray([[token]], jnp.int32))
        for layer, block in enumerate(self.model.blocks):
            q, k, v = self._project(block, x, np.asarray([self.next]))
            self.others[layer].append((k, v))
            heads = [self._softmax(block, q[:, :, 0], self._union(part[layer]), t) for part, t in self._parts()]
            (out_c, lse_c), (out_o, lse_o) = heads
            weights = softmax(np.stack([self.scale * self.temperature * lse_c, lse_o], axis=-1))
            out = weights[..., :1] * out_c + weights[..., 1:] * out_o
            out = jnp.asarray(out.reshape(1, 1, -1, out.shape[-1]), jnp.float32)
            x = block.finish(x, out)
        self.next += 1
        return np.asarray(self.model.unembed(x[:, 0]))[0]

    def _parts(self):
        return (self.contexts, self.temperature), (self.others, 1.0)

    def _union(self, rows):
        return [np.concatenate(arrays, axis=1) for arrays in zip(*rows, strict=True)]

    def _softmax(self, block, q, rows, temperature):
        logits = np.einsum("grd,gsd->grs", q, rows[0]) * block.spec.scale / temperature
        top = logits.max(axis=-1, keepdims=True)
        lse = np.log(np.exp(logits - top).sum(axis=-1)) + top[..., 0]
        return np.einsum("grs,gsd->grd", softmax(logits), rows[1]), lse

    def _alone(self, text, start):
        """Keys and values of every layer of one text under plain causal attention."""
        rows, x = [], self.model.embed(jnp.asarray([text], jnp.int32))
        hidden = np.tril(np.ones((len(text), len(text)), bool))
        for block in self.model.blocks:
            q, k, v = self._project(block, x, start + np.arange(len(text)))
            p = softmax(np.where(hidden, np.einsum("grtd,gsd->grts", q, k) * block.spec.scale, -np.inf))
            out = np.einsum("grts,gsd->grtd", p, v)
            out = jnp.asarray(out.reshape(-1, *out.shape[2:]).transpose(1, 0, 2)[None], jnp.float32)
            x = block.finish(x, out)
            rows.append((k, v))
        return rows

    def _project(self, block, x, positions):
        q, k, v = block.project(x)
        spots = jnp.asarray(positions, jnp.int32)[None, :, None]
        q, k = block.rotary(q, spots), block.rotary(k, spots)
        q = (
            np.asarray(q[0], np.float64)
            .transpose(1, 0, 2)
            .reshape(block.spec.kv_heads, -1, len(positions), q.shape[-1])
        )
        return q, *(np.asarray(rows[0], np.float64).transpose(1, 0, 2) for rows in (k, v))


@pytest.mark.sampled
@pytest.mark.parametrize(("temperature", "scale"), [(0.9, 0.9), (0.5, 1.3), (1.0, 1.0)])
def test_logits_of_question_and_generation_equal_brute_force(model, temperature, scale):
    prefix, *contexts, question = texts(4, 17, 9, 13, 8)
    oracle = Brute(model, prefix, contexts, temperature, scale)
    policy = policies.ape(temperature, scale)
    prompt = kvx.labelled_prompt([prefix], [contexts])
    _, cache = kvx.prefill(model, prompt.tokens, policy, prompt.lengths, labels=prompt.labels)
    assert cache.next.tolist() == [4 + 17]
    for token in question:
        logits, cache = kvx.decode_step(model, np.asarray([token]), cache, policy)
        # float32 against float64 over three layers.
        np.testing.assert_allclose(logits[0], oracle.step(token), atol=2e-4)


def test_the_order_of_contexts_does_not_matter(model):
    prefix, *contexts, question = texts(4, 17, 9, 13, 8)
    one, _ = ask(model, policies.ape(), prefix, contexts, question)
    two, _ = ask(model, policies.ape(), prefix, contexts[::-1], question)
    np.testing.assert_allclose(one, two, atol=2e-5)


def test_a_row_of_a_ragged_batch_equals_the_row_alone(model):
    """Other prefixes, other numbers of contexts, one row without any."""
    prefixes = texts(4, 7, 5)
    contexts = [texts(17, 30, seed=1), texts(3, 12, 8, seed=2), []]
    questions = np.asarray(texts(6, 6, 6, seed=3))
    prompt = kvx.labelled_prompt(prefixes, contexts)
    assert prompt.lengths.tolist() == [51, 30, 5] and prompt.tokens.shape == (3, 51)
    policy = policies.ape()
    _, cache = kvx.prefill(model, prompt.tokens, policy, prompt.lengths, labels=prompt.labels)
    assert cache.next.tolist() == [34, 19, 5]
    logits, cache = kvx.prefill(model, questions, policy, np.asarray([6, 2, 6]), cache)
    assert cache.next.tolist() == [40, 21, 11]
    for row, count in enumerate((6, 2, 6)):
        alone, _ = ask(model, policy, prefixes[row], contexts[row], questions[row, :count])
        np.testing.assert_allclose(logits[row], alone[0], atol=5e-4)


def test_generation_continues_the_question(model):
    prefix, *contexts, question = texts(4, 17, 9, 8)
    prompt = kvx.labelled_prompt([prefix], [contexts])
    policy = policies.ape()
    _, cache = kvx.prefill(model, prompt.tokens, policy, prompt.lengths, labels=prompt.labels)
    answer = kvx.generate(model, np.asarray([question]), policy=policy, cache=cache, max_new_tokens=5)
    logits, _ = ask(model, policy, prefix, contexts, question)
    assert answer.tokens[0, 0] == np.argmax(logits[0])
    logits, _ = ask(model, policy, prefix, contexts, question + answer.tokens[0, :4].tolist())
    assert answer.tokens[0, 4] == np.argmax(logits[0])


def test_without_labels_it_is_the_full_cache(model):
    prompt, lengths = tiny.prompts(50, 31)
    logits, cache = kvx.prefill(model, prompt, policies.ape(0.5, 0.5), lengths)
    full, _ = kvx.prefill(model, prompt, policies.full(), lengths)
    np.testing.assert_allclose(logits, full, atol=1e-5)
    assert cache.next.tolist() == [50, 31]


POSITIONS = np.asarray([[0, 1, 2, 3, 4, 2, 3, -1], [0, 1, 1, 2, -1, -1, -1, -1]])
CONTEXTS = np.asarray([[0, 0, 1, 1, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0, 0, 0]], bool)


def store(temperature, scale):
    """Two rows of contexts that share positions, for a query at position 6."""
    spread = np.broadcast_to(CONTEXTS[:, None], (2, SPEC.kv_heads, 8))
    held = tokens(POSITIONS)
    dense = Dense(held.keys, held.values, held.positions, held.rotary, {"context": jnp.asarray(spread)})
    return Tempered(dense, temperature, scale)


@pytest.mark.parametrize(("temperature", "scale"), [(0.9, 0.9), (0.3, 1.0), (1.0, 0.2)])
def test_the_weights_are_those_of_the_closed_form(temperature, scale):
    """Context row j: exp(l_c + (S T - 1) L_c); other row j: exp(l_o); float64."""
    made, asked = store(temperature, scale), query([[6], [6]])
    keys, values = (np.asarray(array, np.float64) for array in made.dense()[:2])
    logits = SPEC.scale * np.einsum("bgrtd,bgcd->bgrtc", np.asarray(asked.rotated, np.float64), keys)
    context, other = (
        (CONTEXTS & (POSITIONS >= 0))[:, None, None, None],
        (~CONTEXTS & (POSITIONS >= 0))[:, None, None, None],
    )
    tempered = logits / temperature
    mass = np.log(np.sum(np.where(context, np.exp(tempered), 0), axis=-1, keepdims=True))
    raw = np.where(context, np.exp(tempered + (scale * temperature - 1) * mass), np.where(other, np.exp(logits), 0))
    part = made.read(asked)
    weights = raw / raw.sum(-1, keepdims=True)
    np.testing.assert_allclose(part.lse, np.log(raw.sum(-1)), rtol=1e-5)
    np.testing.assert_allclose(made.probabilities(asked, part.lse), weights, atol=1e-5)
    np.testing.assert_allclose(part.out, np.einsum("bgrtc,bgcv->bgrtv", weights, values), atol=2e-5)


def test_without_temperature_and_scale_it_is_one_softmax_over_the_union():
    made, asked = store(1.0, 1.0), query([[6], [6]])
    out, lse, probabilities = attention(asked, *made.dense())
    part = made.read(asked)
    np.testing.assert_allclose(part.out, out, atol=2e-5)
    np.testing.assert_allclose(part.lse, lse, atol=1e-5)
    np.testing.assert_allclose(made.probabilities(asked, part.lse), probabilities, atol=1e-5)


def test_a_larger_scale_gives_contexts_more_exactly_where_their_log_sum_exp_is_positive():
    asked, shares = query([[6], [6]], seed=3), []
    for scale in (0.5, 1.0):
        made = store(1.0, scale)
        part = made.read(asked)
        weights = np.asarray(made.probabilities(asked, part.lse))
        np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
        shares.append(np.where(CONTEXTS[:, None, None, None], weights, 0).sum(-1))
    logits = SPEC.scale * np.einsum("bgrtd,bgcd->bgrtc", asked.rotated, made.dense()[0])
    masses = np.log(np.where((CONTEXTS & (POSITIONS >= 0))[:, None, None, None], np.exp(logits), 0).sum(-1))
    np.testing.assert_array_equal(shares[1] > shares[0], masses > 0)
    assert (masses > 0).any() and (masses < 0).any(), "both happen here"


def test_a_query_that_sees_no_context_or_nothing_is_finite_and_merges():
    made = store(0.9, 0.9)
    empty = Tempered(made.inner.crop(jnp.asarray([0, 0], jnp.int32)), 0.9, 0.9)
    asked = query([[6], [-1]])
    nothing, part = empty.read(asked), made.read(asked)
    assert not np.asarray(nothing.out).any() and (np.asarray(nothing.lse) == -np.inf).all()
    assert not np.asarray(part.out[1]).any() and (np.asarray(part.lse[1]) == -np.inf).all()
    np.testing.assert_allclose(merge_partials(part, nothing).out, part.out, atol=1e-6)


def test_contexts_together_may_be_longer_than_the_model_s_positions():
    model = tiny.model(num_hidden_layers=2, max_position_embeddings=64)
    prefix, *contexts, question = texts(4, 40, 40, 40, 5)
    logits, cache = ask_within(model, prefix, contexts, question)
    assert cache.next.tolist() == [49] and np.isfinite(np.asarray(logits)).all()
    with pytest.raises(kvx.BadInput, match="labels lay tokens out over 71 positions, 16 of them for new tokens"):
        ask_within(model, prefix, [*contexts, texts(51)[0]], question)


def ask_within(model, prefix, contexts, question):
    prompt = kvx.labelled_prompt([prefix], [contexts])
    policy = policies.ape()
    _, cache = kvx.prefill(model, prompt.tokens, policy, prompt.lengths, labels=prompt.labels, max_new_tokens=16)
    return kvx.prefill(model, np.asarray([question]), policy, cache=cache)


def test_labels_of_a_context_say_so_in_the_cache_and_bytes_count_them(model):
    prefix, *contexts = texts(4, 17, 9)
    prompt = kvx.labelled_prompt([prefix], [contexts])
    _, cache = kvx.prefill(model, prompt.tokens, policies.ape(), prompt.lengths, labels=prompt.labels)
    _, full = kvx.prefill(model, prompt.tokens, policies.full(), prompt.lengths)
    for layer in cache.layers:
        assert np.asarray(layer.stats["context"]).sum(axis=-1).tolist() == [[26, 26]]
    flags = sum(layer.stats["context"].nbytes for layer in cache.layers)
    assert cache.nbytes == full.nbytes + flags == sum(leaf.nbytes for leaf in jax.tree.leaves(cache))


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([0, 1, 1, 0, 2, 2], "labels fall from 1 to 0 in row 0"),
        ([0, 2, 2, 1, 1, 1], "labels fall from 2 to 1 in row 0"),
        ([0, 1, 1, -1, 2, 2], "labels holds -1"),
    ],
)
def test_labels_out_of_order_are_refused(model, labels, words):
    with pytest.raises(kvx.BadInput, match=words):
        kvx.prefill(model, np.ones((1, 6), np.int32), policies.ape(), labels=np.asarray([labels]))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: policies.ape(temperature=0), "temperature=0 is out of range"),
        (lambda: policies.ape(scale=float("nan")), "scale=nan is out of range"),
        (lambda: kvx.chain(policies.snapkv(32, window=8), policies.ape()), "relies on slots and positions of its own"),
        (lambda: kvx.labelled_prompt([[1]], []), "prefixes has 1 rows and contexts 0"),
        (lambda: kvx.labelled_prompt([[1]], [[[2], []]]), "empty text in row 0"),
        (lambda: kvx.labelled_prompt([[]], [[]]), "empty text in row 0"),
    ],
)
def test_what_cannot_be_is_refused(call, words):
    with pytest.raises(kvx.BadInput, match=words):
        call()
