"""Latent attention: its two forms agree, with each other and with what it generalises, and its gradients are right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvx
from kvx.loop import attend_turned, forward, turn_to
from kvx.models.block import Expanded
from kvx.models.build import random_model
from kvx.models.mla import LatentConfig
from kvx.models.upcycle import parameters, with_latent_attention
from kvx.train.convert import recipe
from tests import tiny, tiny_latent
from tests.models.reference_forward import reference_forward
from tests.models.tiny_configs import GEMMA2, LLAMA

# Sums of float32 in another order: 1e-6 of logits near 10, with room.
ROUNDING = 5e-5


def tokens(length: int = 24, rows: int = 2, seed: int = 0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 97, (rows, length)), jnp.int32)


QUICK = ("a rotary key for every two heads", "norms and a query rank", "no content")
KINDS = [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in tiny_latent.KINDS]


@pytest.mark.parametrize("kind", KINDS)
def test_the_absorbed_form_equals_the_expanded_one(kind):
    """A naive softmax over the absorbed projections, and the plain pass, which expands."""
    model = tiny_latent.model(kind)
    assert jnp.abs(reference_forward(model, tokens()) - forward(model, tokens())).max() < ROUNDING


@pytest.mark.parametrize("blocks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_both_forms_agree_under_any_mask(blocks):
    """Packed documents, padding, a sliding window and a soft cap at once."""
    latent = tiny_latent.layer(blocks=blocks, heads=4)
    config = GEMMA2 | {"kvx_mla": {"layers": {str(index): latent.entry() for index in (0, 1)}}}
    model = random_model(config | {"sliding_window": 6})
    assert [block.spec.window for block in model.blocks] == [6, None, 6, None]
    assert model.blocks[0].spec.softcap == 2.0
    segments = jnp.asarray([[3] * 9 + [4] * 15, [7] * 24])
    positions = jnp.asarray([[*range(9), *range(15)], [*range(20), -1, -1, -1, -1]])
    x = model.embed(tokens())
    for block in model.blocks[:2]:
        absorbed, expanded = (
            attend_turned.__wrapped__(form, x, positions, turn_to(form.rotary, positions), segments=segments)[0]
            for form in (Expanded(block, block.attention), block.expanded)
        )
        assert jnp.abs(absorbed - expanded)[positions >= 0].max() < ROUNDING


@pytest.mark.parametrize(
    "kind", ["a rotary key for every two heads", pytest.param("norms and a query rank", marks=pytest.mark.slow)]
)
def test_steps_after_a_prefill_equal_the_plain_pass(kind):
    model, text = tiny_latent.model(kind, latent=(0, 2)), tokens(30)
    logits, cache = kvx.prefill(model, text[:, :17], kvx.policies.full(), max_new_tokens=13)
    scores, _ = kvx.teacher_forced(model, text[:, 17:], cache, kvx.policies.full(), logits)
    wanted = jax.nn.log_softmax(model(text))[:, 16:-1]
    wanted = jnp.take_along_axis(wanted, text[:, 17:, None], axis=-1)[..., 0]
    assert jnp.abs(scores - wanted).max() < ROUNDING


def changed(model, layer: int, **arrays):
    """The model with some parameters of one latent layer replaced."""
    attention = model.blocks[layer].attention
    weights = {name: parameter[...] for name, parameter in parameters(attention).items()} | arrays
    return with_latent_attention(
        model, {layer: (attention.config, weights, attention.frequencies[...], attention.magnitude)}
    )


def test_rotating_the_latent_changes_nothing():
    """c becomes Q c and W_UKV becomes W_UKV Q^T: the latent is known up to an orthogonal matrix."""
    model = tiny_latent.model()
    attention = model.blocks[1].attention
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((32, 32)))[0].astype(np.float32)
    down, up = attention.kv_a.kernel[...], attention.kv_b.kernel[...]
    turned = changed(
        model,
        1,
        kv_a=jnp.concatenate([down[:, :32] @ turn.T, down[:, 32:]], axis=1),
        kv_b=jnp.einsum("sr,rhv->shv", turn, up),
    )
    assert jnp.abs(turned(tokens()) - model(tokens())).max() < ROUNDING


def grouped_as_latent(model, layer: int, rotate: bool):
    """One layer's grouped attention, written as latent attention that keeps all of it.

    Rotated: every KV head has a rotary block of its own, and the latent is the values. Not rotated: no rotary key, and
    the latent is keys and values, copied to the heads of each group.
    """
    attention = model.blocks[layer].attention
    spec, qkv = attention.spec, np.asarray(attention.qkv.kernel[...])
    width, kv_heads, dim = qkv.shape[0], spec.kv_heads, spec.key_dim
    q, k, v = qkv[:, :, :-2].reshape(width, spec.heads, dim), qkv[:, :, -2], qkv[:, :, -1]
    flat, copies = (width, -1), np.arange(spec.heads) // spec.group
    own = np.eye(kv_heads)[:, copies][:, None, :, None] * np.eye(dim)[None, :, None, :]  # (G, D, H, D)
    copied = own.reshape(kv_heads * dim, spec.heads, dim)
    config = {"heads": spec.heads, "value": dim, "scale": spec.scale}
    if rotate:
        halves = k.reshape(width, kv_heads, 2, dim // 2).transpose(0, 2, 1, 3)  # real parts of all blocks first
        config |= {"rank": kv_heads * dim, "rotary": kv_heads * dim, "blocks": kv_heads, "content": 0}
        down = np.concatenate([v.reshape(flat), halves.reshape(flat)], axis=1)
        up, frequencies = copied, np.tile(attention.frequencies[...], kv_heads)
    else:
        config |= {"rank": 2 * kv_heads * dim, "rotary": 0, "content": dim}
        down = np.concatenate([k.reshape(flat), v.reshape(flat)], axis=1)
        nothing = np.zeros_like(copied)
        up = np.concatenate([np.concatenate([copied, nothing]), np.concatenate([nothing, copied])], axis=2)
        frequencies = np.zeros(0, np.float32)
    weights = {"q": q, "kv_a": down, "kv_b": up, "out": attention.out.kernel[...]}
    return with_latent_attention(model, {layer: (LatentConfig(**config), weights, frequencies)})


def test_full_rank_without_a_rotary_key_is_grouped_attention_without_rotation():
    model = random_model(LLAMA)
    for block in model.blocks:
        block.attention.frequencies.set_value(jnp.zeros_like(block.attention.frequencies[...]))
    latent = grouped_as_latent(grouped_as_latent(model, 0, rotate=False), 2, rotate=False)
    assert jnp.abs(latent(tokens()) - model(tokens())).max() < ROUNDING


def test_a_rotary_block_for_every_group_is_grouped_attention():
    """And under a policy too: what a cache holds then is values and rotated keys of all heads in one row."""
    model = random_model(LLAMA)
    latent = grouped_as_latent(model, 1, rotate=True)
    assert jnp.abs(latent(tokens()) - model(tokens())).max() < ROUNDING
    ours, theirs = (kvx.prefill(each, tokens(), kvx.policies.full())[0] for each in (latent, model))
    assert jnp.abs(ours - theirs).max() < ROUNDING


@pytest.mark.parametrize(
    "kind", ["a rotary key for every two heads", pytest.param("one rotary key", marks=pytest.mark.slow)]
)
def test_only_distances_matter(kind):
    model = tiny_latent.model(kind)
    index = jnp.broadcast_to(jnp.arange(24), (2, 24))
    # Rotation by up to 1024 radians in float32 is right to 1e-4.
    assert jnp.abs(forward(model, tokens(), positions=index + 1000) - model(tokens())).max() < 2e-3
    assert jnp.abs(forward(model, tokens(), positions=2 * index) - model(tokens())).max() > 0.05


@pytest.mark.slow
def test_packed_documents_are_what_they_are_alone():
    model, text = tiny_latent.model(latent=(1,)), tokens(20, rows=1)
    segments = jnp.asarray([[5] * 8 + [2] * 12])
    packed = forward(model, text, segments)
    apart = jnp.concatenate([model(text[:, :8]), model(text[:, 8:])], axis=1)
    assert jnp.abs(packed - apart).max() < ROUNDING


def next_token_loss(model):
    """Cross-entropy of the next token over twelve."""
    logits = jax.nn.log_softmax(forward(model, tokens(12)))
    return -jnp.mean(jnp.take_along_axis(logits[:, :-1], tokens(12)[:, 1:, None], axis=-1))


GRADIENTS = {
    "random": lambda: tiny_latent.model("norms and a query rank", latent=(0,), num_hidden_layers=2),
    "converted": lambda: recipe("mha2mla", rank=40, rotary=16, choice="high")(tiny.model(num_hidden_layers=2))[0],
}


@pytest.mark.parametrize("kind", ["converted", pytest.param("random", marks=pytest.mark.slow)])
def test_gradients_match_finite_differences(kind):
    """In random directions, which every entry has a part in: one that is dropped is missed unless it is tiny."""
    model, random = GRADIENTS[kind](), np.random.default_rng(0)
    gradient = jax.jit(jax.grad(next_token_loss))(model)
    value, weights = jax.jit(next_token_loss), parameters(model.blocks[0].attention)
    for name, slope in parameters(gradient.blocks[0].attention).items():
        weight = weights[name][...]
        for _ in range(2):
            direction = jnp.asarray(random.standard_normal(weight.shape), jnp.float32)
            step = 3e-3 * jnp.linalg.norm(weight) / jnp.linalg.norm(direction)
            ends = [value(changed(model, 0, **{name: weight + sign * step * direction})) for sign in (-1, 1)]
            # A slope is as large as the gradient; float32 differences of a loss near 6 were right to 7e-4 of it.
            apart = (ends[1] - ends[0]) / (2 * step) - jnp.sum(slope[...] * direction)
            assert abs(float(apart)) < 3e-3 * float(jnp.linalg.norm(slope[...])), name


def test_only_the_named_layers_change_and_the_rest_is_shared():
    model = tiny.model(num_hidden_layers=3)
    hybrid = tiny_latent.model(latent=(1,))
    attention = hybrid.blocks[1].attention
    weights = {name: parameter[...] for name, parameter in parameters(attention).items()}
    converted = with_latent_attention(model, {1: (attention.config, weights, attention.frequencies[...])})
    assert [block.spec.latent for block in converted.blocks] == [False, True, False]
    assert not any(block.spec.latent for block in model.blocks)
    assert converted.embedding.table[...] is model.embedding.table[...]
    assert converted.blocks[0].attention.qkv.kernel[...] is model.blocks[0].attention.qkv.kernel[...]
    assert converted.blocks[1].mlp.down.kernel[...] is model.blocks[1].mlp.down.kernel[...]
    # Random weights follow from a tensor's name alone, so that the other model's layers 0 and 2 are the same.
    np.testing.assert_array_equal(converted(tokens()), hybrid(tokens()))
    twice = with_latent_attention(converted, {0: (attention.config, weights, attention.frequencies[...])})
    assert [block.spec.latent for block in twice.blocks] == [True, True, False]


def test_equal_latent_layers_share_one_compiled_body():
    first, second, third = tiny_latent.model(latent=(0, 1)).blocks
    assert jax.tree.structure(first) == jax.tree.structure(second) != jax.tree.structure(third)


REFUSED = {
    "rank=0 of latent attention: expected an integer of at least 1": {"rank": 0},
    "rotary=-2 of latent": {"rotary": -2},
    "blocks=3 of latent attention: expected a divisor of heads=4": {"blocks": 3},
    "rotary=6 of latent attention: expected a multiple of 4, pairs of channels in each of blocks=2": {
        "rotary": 6,
        "blocks": 2,
    },
    "content=0 and rotary=0": {"content": 0, "rotary": 0},
    "query_norm=True of latent attention: expected False where query_rank is None": {"query_norm": True},
    "query_rank=0 of latent": {"query_rank": 0},
    "scale=nan of latent attention: expected a finite number above 0": {"scale": float("nan")},
    "value=True of latent": {"value": True},
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_widths_that_cannot_be_are_refused(sentence):
    with pytest.raises(kvx.BadInput, match=sentence):
        LatentConfig(**tiny_latent.PLAIN | REFUSED[sentence])


def test_conversions_that_do_not_fit_the_model_are_refused():
    model, attention = tiny.model(num_hidden_layers=3), tiny_latent.model().blocks[0].attention
    weights = {name: parameter[...] for name, parameter in parameters(attention).items()}
    frequencies = attention.frequencies[...]

    def converted(layer=0, frequencies=frequencies, **changes):
        return with_latent_attention(model, {layer: (attention.config, weights | changes, frequencies)})

    with pytest.raises(kvx.BadInput, match="names layer 3: expected 0 to 2, the model's layers"):
        converted(layer=3)
    with pytest.raises(kvx.BadInput, match=r"weight 'kv_b' of layer 0 has shape \(2, 2\): expected \(32, 4, 44\)"):
        converted(kv_b=np.zeros((2, 2)))
    with pytest.raises(kvx.BadInput, match="weights of layer 0 have 'kv_norm'"):
        converted(kv_norm=np.ones(32))
    with pytest.raises(kvx.BadInput, match=r"have shape \(7,\): expected 8 finite numbers"):
        converted(frequencies=frequencies[1:])
    with pytest.raises(kvx.BadInput, match="finite numbers"):
        converted(frequencies=np.full(8, np.nan))
