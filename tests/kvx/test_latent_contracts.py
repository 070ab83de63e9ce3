"""The contracts of policies on a hybrid model: two layers of latent attention around one that is grouped."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvx
from kvx.evidence import Requests
from kvx.kernels.prefill_attention.columns import SQUARE, SUM
from kvx.loop import attend, project
from kvx.mesh import place_model
from tests import tiny, tiny_latent
from tests.kvx.test_contracts import BUDGET, LENGTHS, forced, kept, run
from tests.kvx.test_mesh import mesh

CASES = {
    "full": "full",
    "snapkv": "snapkv({budget}, window=8)",
    "h2o": "h2o({budget})",
    "streaming_llm": "streaming_llm({budget})",
    "tova": "tova({budget})",
    "knorm": "knorm({budget})",
    "pyramidkv": "pyramidkv({budget}, window=8, beta=4)",
    "adakv": "adakv({budget}, window=8)",
    "hashevict": "hashevict({budget})",
    "roco": "roco({budget})",
    "quest": "quest({budget}, page=8, skip=(1,))",
    "paged": "paged()",
    "snapkv+paged": "snapkv({budget}, window=8)+paged(8)",
    "latent_codes": "latent_codes({codes})",
    "snapkv+latent_codes": "snapkv({budget}, window=8)+latent_codes({codes})",
    "h2o+latent_codes": "h2o({budget})+latent_codes({codes})",
}
EVICTING = [name for name in CASES if name.split("+")[0] not in ("full", "latent_codes", "quest", "paged")]


def policy(name: str, budget: int, codes: str = "bits=8"):
    """A case at a budget; the exact one where codes are `bits=None`."""
    return kvx.parse_policy(CASES[name].format(budget=budget, codes=codes))


IDENTITIES = [name if name == "latent_codes" else pytest.param(name, marks=pytest.mark.slow) for name in CASES]


@pytest.fixture(scope="module")
def model():
    return tiny_latent.model("a rotary key for every two heads", latent=(0, 2))


@pytest.mark.parametrize("name", IDENTITIES)
def test_a_budget_that_holds_every_token_is_the_full_cache(model, name):
    tokens, lengths = tiny.prompts(*LENGTHS)
    full, _ = run(model, kvx.policies.full(), tokens, lengths, forced())
    scores, _ = run(model, policy(name, 4096, "bits=None"), tokens, lengths, forced())
    # 1e-5 of the largest logit, about 10 here; two log-softmaxes of rounding on top.
    assert np.abs(scores - full).max() < 2e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_row_of_a_batch_equals_the_row_alone(model, name):
    tokens, lengths = tiny.prompts(*LENGTHS)
    scores, cache = run(model, policy(name, BUDGET), tokens, lengths, forced())
    for row in (1, 2):
        prompt, continuation = tokens[row : row + 1, : lengths[row]], forced()[row : row + 1]
        alone, single = run(model, policy(name, BUDGET), prompt, None, continuation)
        assert kept(single, 0) == kept(cache, row)
        # Float noise may flip a code, which moves a latent by a step of 1/255 of its range.
        assert np.abs(alone[0] - scores[row]).max() < (0.1 if "codes" in name else 5e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", EVICTING)
def test_the_budget_bounds_what_is_kept_and_bytes_are_saved(model, name):
    tokens, lengths = tiny.prompts(*LENGTHS)
    chosen = policy(name, BUDGET)
    _, cache = run(model, chosen, tokens, lengths, forced())
    for row, length in enumerate(lengths):
        counts = [len(head) for layer in kept(cache, row) for head in layer]
        generated = 0 if chosen.bounded else forced().shape[1]
        assert np.mean(counts) <= min(BUDGET, length + forced().shape[1]) + generated
    _, everything = run(model, kvx.policies.full(), tokens, lengths, forced())
    assert cache.nbytes < everything.nbytes


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_chunked_prefill_that_compresses_at_the_end_equals_unchunked(model, name):
    tokens, lengths = tiny.prompts(*LENGTHS)
    whole, cache = run(model, policy(name, BUDGET, "bits=None"), tokens, lengths, forced())
    chunked, pieces = run(model, policy(name, BUDGET, "bits=None"), tokens, lengths, forced(), prefill_chunk=32)
    assert [kept(cache, row) for row in range(3)] == [kept(pieces, row) for row in range(3)]
    assert np.abs(whole - chunked).max() < 5e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    "text", ["cake({}, window=8)", "tidaldecode({}, layers=(0,))", "razor_attention({}, heads=())"]
)
def test_policies_whose_layers_have_to_be_alike_serve_latent_ones(text):
    """At a budget that holds every token; those of a hybrid are refused (`stores/test_latent.py`)."""
    tokens, lengths = tiny.prompts(*LENGTHS)
    full, _ = run(tiny_latent.model(), kvx.policies.full(), tokens, lengths, forced())
    scores, _ = run(tiny_latent.model(), kvx.parse_policy(text.format(4096)), tokens, lengths, forced())
    assert np.abs(scores - full).max() < 2e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "h2o", "latent_codes"])
def test_a_mesh_gives_the_tokens_and_positions_of_one_device(model, name):
    tokens, lengths = tiny.prompts(40, 33, 21, 40)
    placed = place_model(model, mesh())
    one, many = (
        kvx.generate(each, tokens, policy=policy(name, 24), lengths=lengths, max_new_tokens=8)
        for each in (model, placed)
    )
    np.testing.assert_array_equal(one.tokens, many.tokens)
    for ours, theirs in zip(one.cache.layers, many.cache.layers, strict=True):
        np.testing.assert_array_equal(ours.positions(), theirs.positions())


@pytest.mark.slow
def test_codes_of_eight_bits_hardly_change_what_is_read(model):
    tokens, lengths = tiny.prompts(*LENGTHS)
    full, exact = run(model, kvx.policies.full(), tokens, lengths, forced())
    coded, cache = run(model, kvx.policies.latent_codes(8, group=16), tokens, lengths, forced())
    rough, _ = run(model, kvx.policies.latent_codes(2, group=16), tokens, lengths, forced())
    assert np.abs(coded - full).mean() < np.abs(rough - full).mean() / 10
    assert cache.nbytes < exact.nbytes


@pytest.mark.parametrize("column", [SUM, replace(SQUARE, pooled=True)], ids=["sum", "pooled squares"])
def test_evidence_is_about_the_rows_that_are_kept_whatever_form_attends(model, column):
    """Columns and rows of a prompt, which every head attends apart, against those of [rotary key ; latent]."""
    block, x = model.blocks[0], model.embed(jnp.asarray(tiny.prompts(30, 30)[0]))
    positions = jnp.broadcast_to(jnp.arange(30, dtype=jnp.int32), (2, 30))
    _, _, found = attend(block, x, positions, requests=Requests(rows=3, columns=frozenset({column})))
    query, tokens = project(block, x, positions)
    logits = query.spec.scale * jnp.einsum("bgrtd,bgsd->bgrts", query.rotated, tokens.rotated_keys)
    chances = jax.nn.softmax(jnp.where(np.tri(30, dtype=bool), logits, -jnp.inf))
    np.testing.assert_allclose(found.rows, chances[..., -3:, :], atol=1e-5)
    wanted = jnp.mean(chances, axis=2, keepdims=True) if column.pooled else chances
    wanted = jnp.broadcast_to(jnp.sum(wanted**column.power, axis=3), found.columns[column].shape)
    np.testing.assert_allclose(found.columns[column], wanted, atol=1e-4)


@pytest.mark.slow
def test_filters_of_unlike_layers_are_refused_and_of_like_ones_serve(model):
    texts, tokens = [tiny.prompts(48, 48)[0]], tiny.prompts(60, 40)[0]
    with pytest.raises(kvx.BadInput, match=r"one array, but theirs are of shapes .*; allowed: models whose layers"):
        kvx.calibrate(kvx.policies.q_filters(24, window=8), model, texts)
    alike = tiny_latent.model()
    filters = kvx.calibrate(kvx.policies.q_filters(24, window=8), alike, texts)
    _, cache = kvx.prefill(alike, tokens, filters)
    assert all(len(head) == 24 for layer in kept(cache, 0) for head in layer)
