"""Claims about the head search (RazorAttention): scores against whole attention maps, synthetic heads, ranks, text."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvx
from kvx.context import Activations
from kvx.errors import BadInput
from kvx.parts.retrieval_heads import RetrievalHeads
from kvx.policies import razor_attention, snapkv
from tests.kvx.policies.direct import attention, softmax
from tests.kvx.policies.masked_simulation import Simulation
from tests.tiny import model

N, REPEATS = 7, 4
S = N * REPEATS


def activations(queries, keys, **spec):
    """(G, R, S, D) and (G, S, D)."""
    groups, group, _, dim = np.shape(queries)
    where = replace(attention(groups * group, groups, dim), **spec)
    return Activations(*(jnp.asarray(each, jnp.float32) for each in (queries, keys, keys)), where)


def dense_scores(probabilities, start=0, block=N):
    """Induction and echo of attention maps (..., S, S): two masks over the whole square."""
    length = probabilities.shape[-1]
    echo, induction = np.zeros((length, length)), np.zeros((length, length))
    for row in range(start + block, length):
        for back in range(block, row - start + 1, block):
            echo[row, row - back] = induction[row, row - back + 1] = 1
    rows = length - start - block
    return np.stack([(probabilities * mask).sum(axis=(-1, -2)) / rows for mask in (induction, echo)])


def causal(logits):
    return softmax(np.where(np.tril(np.ones(logits.shape[-2:], bool)), logits, -np.inf))


@pytest.mark.sampled
@pytest.mark.parametrize("bos", [None, 5])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 10, N])
def test_scores_equal_masks_over_the_whole_map(bos, softcap, window):
    start = int(bos is not None)
    random = np.random.default_rng(0)
    q, k = random.normal(size=(3, 2, S + start, 16)), random.normal(size=(3, S + start, 16))
    logits = np.einsum("grtd,gsd->grts", q, k) * 16**-0.5
    if softcap:
        logits = softcap * np.tanh(logits / softcap)
    if window:
        distance = np.arange(S + start)[:, None] - np.arange(S + start)
        logits = np.where(distance < window, logits, -np.inf)
    expected = dense_scores(causal(logits), start).max(axis=-1)
    found = RetrievalHeads(bos=bos).digest(activations(q, k, softcap=softcap, window=window))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def synthetic():
    """Heads made by hand: induction, echo, a neighbour's, one that spreads evenly; as queries and keys (4, S, D)."""
    words = np.tile(np.eye(N), (REPEATS, 1))
    places = np.eye(S)
    before = np.roll(words, 1, axis=0)
    before[0] = 0
    wide = lambda array: np.pad(array, ((0, 0), (0, S - array.shape[1])))  # noqa: E731
    nothing = np.zeros((S, S))
    queries = [wide(words), wide(words), np.roll(places, 1, axis=0), nothing]
    keys = [wide(before), wide(words), places, nothing]
    return 400 * np.stack(queries), np.stack(keys)


def test_synthetic_heads_score_what_they_attend_to():
    queries, keys = synthetic()
    induction, echo = np.asarray(RetrievalHeads().digest(activations(queries[:, None], keys)))
    # All of it after the earlier copies; of the copies with the token itself, k of k + 1 in block k.
    np.testing.assert_allclose(induction[0], 1, atol=1e-5)
    np.testing.assert_allclose(echo[1], np.mean([1 / 2, 2 / 3, 3 / 4]), atol=1e-5)
    assert abs(induction[1]) < 1e-5 and abs(echo[0]) < 1e-5
    np.testing.assert_allclose([induction[2], echo[2]], 0, atol=1e-5)
    assert 0 < induction[3] < 0.2 and 0 < echo[3] < 0.2


def test_a_kv_head_scores_by_the_best_of_its_query_heads():
    queries, keys = synthetic()
    both = np.stack([queries[0], queries[3]])[None]
    found = RetrievalHeads().digest(activations(both, keys[:1]))
    np.testing.assert_allclose(found[0], 1, atol=1e-5)


def test_ranks_go_over_the_whole_model_and_the_union_is_taken():
    scores = [jnp.asarray([[0.9, 0.1], [0.0, 0.2]]), jnp.asarray([[0.8, 0.3], [0.5, 0.1]])]
    assert RetrievalHeads(0.5, 0.25).choose(scores) == ((0, 0), (1, 0))
    assert RetrievalHeads(0.25, 0.5).choose(scores) == ((0, 0), (0, 1), (1, 0))
    assert RetrievalHeads(0.0, 0.0).choose(scores) == ()
    assert len(RetrievalHeads(1.0, 0.0).choose(scores)) == 4


def test_equal_scores_choose_as_many_as_asked_the_lower_first():
    scores = [jnp.full((2, 3), 0.5)] * 2
    assert RetrievalHeads(0.5, 0.01).choose(scores) == ((0, 0), (0, 1), (0, 2))


def test_shares_round_up_and_float_rounding_adds_no_head():
    scores = [jnp.asarray(np.random.default_rng(0).uniform(size=(2, 10)))] * 5
    assert len(RetrievalHeads(0.14, 0.0).choose(scores)) == 7
    assert len(RetrievalHeads(0.0, 0.01).choose(scores)) == 1


def test_the_text_repeats_distinct_tokens_and_fits_the_model():
    text = RetrievalHeads(block=50).probe(97, 4096, seed=0)
    assert text.shape == (200,) and len(set(text[:50].tolist())) == 50
    np.testing.assert_array_equal(text, np.tile(text[:50], 4))
    assert RetrievalHeads(bos=1).probe(5000, 128, seed=0).tolist()[0] == 1
    assert len(RetrievalHeads(bos=1).probe(5000, 128, seed=0)) == 1 + 4 * 31
    assert RetrievalHeads(block=300).probe(97, 4096, seed=0).max() < 97, "fewer tokens than a block has"
    assert not np.array_equal(text, RetrievalHeads(block=50).probe(97, 4096, seed=1))


class Maps(Simulation):
    """Every layer's attention over a text."""

    def prompt(self, layers):
        """Nothing is evicted."""

    def __init__(self, model, text):
        self.model, self.maps = model, []
        x = model.embed(jnp.asarray(text[None]))
        for block in model.blocks:
            q, k, v = self._project(block, x, np.arange(len(text)))
            self.maps.append(causal(np.einsum("grtd,gsd->grts", q, k) * block.spec.scale))
            x = self._finish(block, x, np.einsum("grts,gsd->grtd", self.maps[-1], v))


def test_calibration_finds_the_heads_of_a_dense_search_and_needs_no_batches():
    policy = kvx.calibrate(razor_attention(16, induction=0.3, echo=0.2, block=24), model())
    text = RetrievalHeads(block=24).probe(97, 4096, seed=0)
    digests = [jnp.asarray(dense_scores(each, block=24).max(axis=-1)) for each in Maps(model(), text).maps]
    expected = RetrievalHeads(0.3, 0.2).choose(digests)
    assert policy.stages[0].heads == (expected,) and 3 <= len(expected) <= 5
    assert policy.text == f"razor_attention(buffer=16, heads={expected}, induction=0.3, echo=0.2, block=24)"


@pytest.mark.slow
def test_a_calibrated_policy_is_what_its_text_and_its_file_say(tmp_path):
    policy = kvx.calibrate(razor_attention(16, ratio=None, induction=0.2, block=16), model())
    kvx.save_policy(policy, tmp_path / "policy")
    for same in (kvx.parse_policy(policy.text), kvx.load_policy(tmp_path / "policy")):
        assert jax.tree.structure(same) == jax.tree.structure(policy) and same.text == policy.text
    assert kvx.calibrate(policy, model()) is policy, "heads that are known are not searched again"
    result = kvx.generate(model(), np.arange(60)[None], policy=policy, max_new_tokens=8)
    assert result.lengths.tolist() == [8]


def test_in_a_chain_only_its_own_text_names_the_heads():
    policy = kvx.calibrate(kvx.chain(snapkv(64, window=8), razor_attention(16, block=16)), model())
    heads = policy.stages[1].heads[0]
    assert policy.text == f"snapkv(budget=64, window=8)+razor_attention(buffer=16, heads={heads}, block=16)"


def test_a_seed_draws_another_text():
    one, same, other = (RetrievalHeads(block=16).probe(97, 4096, seed=seed).tolist() for seed in (0, 0, 1))
    assert one == same != other


def test_a_text_with_a_token_that_the_model_lacks_is_refused():
    with pytest.raises(BadInput, match="tokens holds 97"):
        kvx.calibrate(razor_attention(16, block=16, bos=97), model())
