"""Claims about converted models: exact where nothing is compressed, and what was asked for where something is."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from kvx.errors import BadInput
from kvx.models.build import random_model
from kvx.train.convert.factorisation import separate
from kvx.train.convert.latent_recipe import Recipe
from kvx.train.convert.ranks import Budget, Fixed
from kvx.train.convert.recipes import by_effect, mha2mla, recipe, transmla, x_ecomla
from kvx.train.convert.rotary_split import ChosenPairs, SharedMean
from kvx.train.convert.source import as_pairs, read_source
from kvx.train.convert.weighing import ByActivations, ByWeights
from tests.models.reference_forward import reference_forward
from tests.models.tiny_configs import CONFIGS
from tests.train.convert import layers
from tests.train.convert.dense import positions_apart

KINDS = [
    "llama-biases",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama2", "llama3.1", "qwen2.5-yarn")),
]
CLOSE = 1e-4
"""float32 logits of size 1 after two layers whose matrices were multiplied out anew."""

TOKENS = jnp.asarray(layers.texts(2, 12, seed=5))


def logits(model) -> np.ndarray:
    return np.asarray(model(TOKENS))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    ("build", "wants"),
    [
        (lambda: transmla(32, 32, fold=1), "RoRoPE on all blocks, rank for the values"),
        (lambda: transmla(32, 32, fold=1, query_rank=64), "and a full query latent"),
        (lambda: mha2mla(32, 32), "all pairs chosen"),
        (lambda: by_effect(32, 32), "everything rotated"),
    ],
)
def test_with_nothing_compressed_the_model_is_the_source(name, build, wants):
    model = layers.model(name)
    converted, report = build()(model, layers.moments(name))
    assert report.after == report.before and all(layer.kept == pytest.approx(1) for layer in report.layers)
    np.testing.assert_allclose(logits(converted), logits(model), atol=CLOSE)


def partially_rotated(kept: np.ndarray):
    """The model with biases, but pairs that are not kept turn at no rate."""
    changed = random_model({**CONFIGS["llama-biases"], **layers.SMALL}, seed=3)
    for block in changed.blocks:
        frequencies = np.where(kept, block.attention.frequencies[...], 0)
        block.attention.frequencies.set_value(jnp.asarray(frequencies, jnp.float32))
    return changed


def test_chosen_pairs_at_full_rank_are_the_source_with_the_others_unrotated():
    model = layers.model("llama-biases")
    masked = partially_rotated(np.arange(8) < 2)
    converted, _ = mha2mla(56, 8, choice="high")(model)
    np.testing.assert_allclose(logits(converted), logits(masked), atol=CLOSE)
    assert np.abs(logits(masked) - logits(model)).max() > 0.1


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("query_rank", [None, 64])
def test_principal_components_at_full_remaining_rank_are_the_partially_rotated_model(name, query_rank):
    """TransMLA's C and D after A and B: whatever norms are balanced, up to r = 2 G D - p nothing more is lost."""
    model, moments = layers.model(name), layers.moments(name)
    build = transmla(2 * 2 * 16 - 8, 8, fold=2, query_rank=query_rank)
    converted, _ = build(model, moments)
    plain = Recipe(build.split, ByActivations(alpha=3.0), Fixed(56))
    expected, _ = plain(model, moments)
    unwhitened, _ = Recipe(build.split, ByWeights(), Fixed(56), factorise=separate, singular="up")(model, moments)
    np.testing.assert_allclose(logits(converted), logits(expected), atol=CLOSE)
    np.testing.assert_allclose(logits(converted), logits(unwhitened), atol=CLOSE)


def test_without_rotation_x_ecomla_at_full_rank_is_the_source_without_rotation():
    """p = 0, n = D: the only exact oracle of the whole that the paper's start has."""
    model = layers.model("llama-biases")
    plain = partially_rotated(np.zeros(8, bool))
    converted, _ = x_ecomla(64, rotary=0, query_rank=64)(model)
    np.testing.assert_allclose(logits(converted), logits(plain), atol=CLOSE)


@pytest.mark.parametrize("query_rank", [None, 60])
def test_x_ecomla_at_full_rank_keeps_values_and_content_keys(query_rank):
    source = layers.source()
    converted, _ = x_ecomla(64, rotary=6, query_rank=query_rank)(layers.model())
    attention = converted.blocks[1].attention
    x = layers.inputs()
    latent = x[:, :-1] @ np.asarray(attention.kv_a.kernel[...])[:, :64]
    both = np.einsum("tr,rhn->thn", latent, np.asarray(attention.kv_b.kernel[...]))
    for head in range(4):
        g = head // 2
        # float32 parameters
        np.testing.assert_allclose(both[:, head, :10], x @ source.key[g, :10].T, atol=1e-4)
        np.testing.assert_allclose(both[:, head, 10:], x @ source.value[g].T, atol=1e-4)


def test_heads_of_a_group_start_equal():
    converted, _ = x_ecomla(8, rotary=6)(layers.model())
    kernel = np.asarray(converted.blocks[0].attention.kv_b.kernel[...])
    np.testing.assert_array_equal(kernel[:, 0], kernel[:, 1])
    np.testing.assert_array_equal(kernel[:, 2], kernel[:, 3])
    assert np.abs(kernel[:, 0] - kernel[:, 2]).max() > 0.01


def test_the_rotary_key_in_the_model_is_that_of_the_split():
    """Layout: pairs half-split over all blocks, at their own frequencies."""
    source, moments = layers.source(), layers.moments()[1]
    split = ChosenPairs(8)(source, moments)
    converted, _ = mha2mla(16, 8)(layers.model(), layers.moments())
    attention = converted.blocks[1].attention
    rows = np.asarray(attention.kv_a.kernel[...]).T[16:]
    np.testing.assert_allclose(as_pairs(rows), split.rotary_key.reshape(4, -1)[:, :-1], atol=1e-6)
    np.testing.assert_allclose(attention.frequencies[...], split.frequencies.ravel(), rtol=1e-6)
    assert attention.config.blocks == 2


@pytest.mark.parametrize("name", KINDS)
def test_a_compressed_layer_computes_what_its_factors_say(name):
    """The whole assembly against plain numpy: the first layer's logits and output in the expanded form."""
    build = by_effect(12, 6)
    model, moments = layers.model(name), layers.moments(name)
    converted, _ = build(model, moments)
    source = read_source(model, 0)
    split = build.split(source, moments[0])
    values = source.value.reshape(-1, source.value.shape[-1])
    factors = build.factorise(split.content_key, values, build.weighing(source, split, moments[0])).at(12)
    x = layers.inputs(name)
    latent = x @ factors.down.T
    keys, value = latent @ factors.key_up.T + factors.key_offset, latent @ factors.value_up.T + factors.value_offset
    expected = np.zeros((len(x), 64)) + (0 if source.out_bias is None else source.out_bias)
    apart = positions_apart(len(x))
    for head in range(source.heads):
        query = (x @ split.rotary_query[head].T).conj()
        turns = np.exp(-1j * apart[..., None] * split.frequencies[0]) * split.magnitude**2
        logits = np.einsum("tp,sp,tsp->ts", query, x @ split.rotary_key[0].T, turns).real
        logits = source.scale * (logits + x @ split.content_query[head].T @ (split.lift[head] @ keys.T))
        weights = np.exp(np.where(apart >= 0, logits, -np.inf))
        weights /= weights.sum(axis=1, keepdims=True)
        own = slice(16 * (head // 2), 16 * (head // 2) + 16)
        expected += weights @ value[:, own] @ source.out[head]
    attention = converted.blocks[0].attention.expanded
    q, k, v = attention.project(jnp.asarray(x[None, :, :-1], jnp.float32))
    q, k = (attention.rotary(a, jnp.arange(len(x))[:, None]) for a in (q, k))
    scores = attention.spec.scale * jnp.einsum("bthd,bshd->bhts", q, k)
    out = jnp.einsum("bhts,bshv->bthv", jax.nn.softmax(jnp.where(apart >= 0, scores, -jnp.inf), axis=-1), v)
    np.testing.assert_allclose(attention.output(out, jnp.float32)[0], expected, atol=CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("build", [lambda: transmla(20, 8), lambda: mha2mla(16, 8)])
def test_both_forms_of_a_converted_model_agree(build):
    converted, _ = build()(layers.model("llama3.1"), layers.moments("llama3.1"))
    np.testing.assert_allclose(reference_forward(converted, TOKENS), logits(converted), atol=CLOSE)


def test_layers_that_are_not_named_stay():
    model = layers.model()
    converted, report = x_ecomla(8, rotary=6, layers=(1,))(model)
    assert [layer.kind for layer in report.layers] == ["kept", "latent"]
    assert report.before == 4 * 2 * 64 and report.after == 4 * (64 + 14)
    assert converted.blocks[0].attention.qkv.kernel[...] is model.blocks[0].attention.qkv.kernel[...]


def test_energy_gives_every_layer_its_own_rank():
    _, report = x_ecomla(8, rotary=6, energy=0.5)(layers.model(num_hidden_layers=3))
    ends, middle = {report.layers[0].rank, report.layers[2].rank}, report.layers[1]
    assert ends == {8} and middle.rank % 8 == 0 and middle.kept >= 0.5


@pytest.mark.parametrize("layers_", [(1, 2), (2,)])
def test_energy_counts_in_every_layer_but_the_model_s_ends(layers_):
    """A hybrid's own first and last converted layers get what they get where all are converted."""
    model, options = layers.model(num_hidden_layers=4), {"rotary": 6, "query_rank": 8, "energy": 0.8}
    of_all, _ = x_ecomla(8, query_energy=0.8, **options)(model)
    some, _ = x_ecomla(8, query_energy=0.8, layers=layers_, **options)(model)
    for layer in layers_:
        ours, theirs = (each.blocks[layer].attention.config for each in (some, of_all))
        assert ours == theirs and ours.rank > 8 and ours.query_rank > 8


def test_a_budget_over_layers_is_spent_exactly():
    model, moments = layers.model(), layers.moments()
    recipe = Recipe(SharedMean(6), ByActivations(), Budget(16))
    _, report = recipe(model, moments)
    assert sum(layer.rank for layer in report.layers) == 32


@pytest.mark.slow
def test_a_norm_on_the_latent_starts_near_the_latent():
    """Its gain is the latent's mean size over the calibration text, hence c / rms(c) * gain is about c."""
    model, moments = layers.model(), layers.moments()
    normed, _ = transmla(24, 8, norm=True)(model, moments)
    plain, _ = transmla(24, 8)(model, moments)
    x = normed.blocks[0].attention_norm(model.embed(jnp.asarray(layers.texts())))
    ours, theirs = (np.asarray(each.blocks[0].attention.row(x)[1]) for each in (normed, plain))
    sizes = [np.sqrt(np.mean(each**2)) for each in (ours, theirs)]
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-4)  # the root mean square over all tokens, by construction
    correlation = np.sum(ours * theirs) / np.sqrt(np.sum(ours**2) * np.sum(theirs**2))
    assert correlation > 0.9


def test_reports_print_what_was_done():
    _, report = x_ecomla(8, rotary=6, layers=(1,))(layers.model())
    console = Console(width=100, file=io.StringIO())
    console.print(report)
    text = console.file.getvalue()
    assert "x_ecomla(rank=8, rotary=6, layers=(1,))" in text and "60.9%" in text and "256" in text and "56" in text


def test_latent_layers_are_not_converted_again():
    converted, _ = x_ecomla(8, rotary=6)(layers.model())
    with pytest.raises(BadInput, match="latent attention already"):
        x_ecomla(4, rotary=6)(converted)


@pytest.mark.parametrize(
    "chosen",
    [
        x_ecomla(8, rotary=6, layers=(1,)),
        x_ecomla(8, rotary=6, query_rank=16, norm=True),
        x_ecomla(8, rotary=6, factorisation="separate"),
        transmla(12, 8),
        mha2mla(8, 4, choice="high"),
        mha2mla(8, 8),
        by_effect(8, 6),
        by_effect(8, 8, fold=4),
        recipe("gqa", kv_heads=1),
    ],
    ids=lambda chosen: chosen.text,
)
def test_shapes_are_those_of_the_converted_model(chosen):
    """But for biases, which only weights tell: conversions that centre the inputs may add some."""
    model = layers.model()
    converted, _ = chosen(model, layers.moments() if chosen.reads_text else None)

    def shapes(model):
        leaves = jax.tree_util.tree_leaves_with_path(model)
        named = {jax.tree_util.keystr(path): (leaf.shape, leaf.dtype) for path, leaf in leaves}
        return {name: shape for name, shape in named.items() if "bias" not in name}

    assert shapes(chosen.shapes(model)) == shapes(converted)
