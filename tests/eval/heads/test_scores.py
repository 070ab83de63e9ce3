"""Claims about head scores: shares equal sums over whole maps, and synthetic heads are what they were made to be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvx
from kvx.eval.heads.scores import retrieval_scores, streaming_shares
from kvx.parts.retrieval_heads import RetrievalHeads
from tests import tiny, tiny_latent
from tests.eval.heads.test_sinks import maps

T, SINKS, RECENT = 30, 3, 7


@pytest.mark.parametrize("kind", ["grouped", "latent"])
def test_shares_equal_sums_over_whole_maps(kind):
    model = tiny.model(num_hidden_layers=2) if kind == "grouped" else tiny_latent.model()
    texts, _ = tiny.prompts(T, T)
    first, local = streaming_shares(model, texts[:1], SINKS, RECENT)
    distance = np.arange(T)[:, None] - np.arange(T)
    for layer, (_, weights, *_) in enumerate(maps(model, texts)):
        rows = weights[:, SINKS + RECENT :]
        near = (distance < RECENT)[SINKS + RECENT :] | (np.arange(T) < SINKS)
        np.testing.assert_allclose(first[layer], rows[..., :SINKS].sum(axis=-1).mean(axis=-1), rtol=1e-3)
        np.testing.assert_allclose(local[layer], (rows * near).sum(axis=-1).mean(axis=-1), rtol=1e-3)


def test_shares_of_a_batch_are_the_means_of_its_texts():
    model, (texts, _) = tiny.model(num_hidden_layers=2), tiny.prompts(T, T)
    together = streaming_shares(model, texts, SINKS, RECENT)
    alone = [streaming_shares(model, texts[row : row + 1], SINKS, RECENT) for row in range(2)]
    np.testing.assert_allclose(np.asarray(together), np.mean(np.asarray(alone), axis=0), rtol=1e-4)


@pytest.mark.parametrize("length, recent", [(50, 45), (129, 1), (200, 13)])
def test_attention_spread_evenly_is_local_by_the_count_of_its_tokens(length, recent):
    """Zero queries: each of them sees i + 1 tokens, of which SINKS + recent are local."""
    model = tiny.model(num_hidden_layers=1)
    (block,) = model.blocks
    even = jax.tree.map(lambda leaf: leaf, model)
    kernel = even.blocks[0].attention.qkv.kernel
    kernel.set_value(kernel[...].at[..., :-2, :].set(0.0))
    texts, _ = tiny.prompts(length)
    first, local = streaming_shares(even, texts, SINKS, recent)
    seen = np.arange(SINKS + recent, length) + 1
    np.testing.assert_allclose(local[0], np.mean((SINKS + recent) / seen), rtol=1e-4)
    np.testing.assert_allclose(first[0], np.mean(SINKS / seen), rtol=1e-4)
    assert jnp.any(block.attention.qkv.kernel[...][..., :-2, :] != 0), "the shared model is as it was"


def test_scores_are_those_that_calibration_chooses_by():
    """razor_attention's own search and this report name the same heads."""
    model = tiny.model(num_hidden_layers=3)
    search = RetrievalHeads(0.3, 0.2, block=20)
    scores = retrieval_scores(model, search)
    policy = kvx.policies.razor_attention(induction=0.3, echo=0.2, block=20)
    assert f"heads={search.choose(scores)!r}" in kvx.calibrate(policy, model).text
    assert [layer.shape for layer in scores] == [(2, 2)] * 3


@pytest.mark.parametrize(
    "sinks, recent, message",
    [(10, 20, "sinks=10 and recent=20 in texts of 30 tokens"), (-1, 5, "sinks=-1"), (1, 0, "recent=0")],
)
def test_texts_without_anything_far_are_refused(sinks, recent, message):
    with pytest.raises(kvx.BadInput, match=message):
        streaming_shares(tiny.model(num_hidden_layers=2), tiny.prompts(T)[0], sinks, recent)
