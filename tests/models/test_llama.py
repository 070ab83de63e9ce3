"""Claims about the Llama family: its identities, and that a model is a pytree that plain JAX can use."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kvx.errors import BadInput
from kvx.models.build import abstract_model, random_model
from kvx.models.layers import RotaryConstant
from tests.models.reference_forward import reference_forward
from tests.models.tiny_configs import CONFIGS, LLAMA, QWEN2

FAMILY = [name for name in CONFIGS if not name.startswith("gemma")]


def tokens(length=40, rows=1):
    return jnp.asarray(np.random.default_rng(1).integers(0, 256, (rows, length)), jnp.int32)


@pytest.mark.parametrize("name", FAMILY)
def test_shapes_are_those_of_the_spec(name):
    model = abstract_model(CONFIGS[name], jnp.float32)
    block, x = model.blocks[0], jax.ShapeDtypeStruct((2, 5, CONFIGS[name]["hidden_size"]), jnp.float32)
    q, k, v = jax.eval_shape(lambda block, x: block.project(x), block, x)
    spec = block.spec
    assert q.shape == (2, 5, spec.heads, spec.key_dim)
    assert k.shape == v.shape == (2, 5, spec.kv_heads, spec.key_dim)
    assert jax.eval_shape(lambda block, x, q: block.finish(x, q), block, x, q).shape == x.shape
    assert jax.eval_shape(lambda model, x: model.unembed(x), model, x).shape == (2, 5, model.vocabulary)


@pytest.mark.parametrize("name", FAMILY)
def test_blocks_of_equal_spec_share_a_treedef(name):
    blocks = abstract_model(CONFIGS[name], jnp.float32).blocks
    for one in blocks:
        for other in blocks:
            same = jax.tree.structure(one) == jax.tree.structure(other)
            assert same == (one.spec == other.spec)


@pytest.mark.slow
def test_grouped_heads_equal_repeated_ones():
    """A model with 2 KV heads for 4 query heads is one with 4 KV heads of which pairs are equal."""
    grouped = random_model(LLAMA, seed=1)
    repeated = random_model(LLAMA | {"num_key_value_heads": 4}, seed=2)
    for ours, theirs in zip(grouped.blocks, repeated.blocks, strict=True):
        kernel = ours.attention.qkv.kernel[...]
        q, k, v = kernel[:, :, :-2], kernel[:, :, -2], kernel[:, :, -1]
        split = jnp.stack([q.reshape(64, 4, 16), jnp.repeat(k, 2, axis=1), jnp.repeat(v, 2, axis=1)], axis=2)
        theirs.attention.qkv.kernel.set_value(split)
        theirs.attention.out = ours.attention.out
        for name in ("attention_norm", "mlp_norm", "mlp"):
            setattr(theirs, name, getattr(ours, name))
    repeated.embedding, repeated.norm, repeated.head = grouped.embedding, grouped.norm, grouped.head
    difference = reference_forward(grouped, tokens()) - reference_forward(repeated, tokens())
    assert jnp.abs(difference).max() < 1e-5  # the same sums, grouped differently


def test_a_tied_model_reads_its_embedding_twice_and_keeps_it_once():
    tied, untied = random_model(LLAMA | {"tie_word_embeddings": True}), random_model(LLAMA)
    assert len(jax.tree.leaves(untied)) == len(jax.tree.leaves(tied)) + 1
    untied.head.table.set_value(tied.embedding.table[...])
    np.testing.assert_array_equal(reference_forward(tied, tokens()), reference_forward(untied, tokens()))


@pytest.mark.parametrize(
    ("name", "without"),
    [
        ("mistral", {"sliding_window": None}),
        ("qwen2-window", {"use_sliding_window": False}),
        ("llama3.1", {"rope_scaling": None}),
        ("llama-linear", {"rope_scaling": None}),
        ("qwen2.5-yarn", {"rope_scaling": None}),
    ],
)
def test_windows_and_scalings_change_the_logits(name, without):
    """So that agreement with a peer at this length means something."""
    config = CONFIGS[name]
    difference = reference_forward(random_model(config), tokens(200)) - reference_forward(
        random_model(config | without), tokens(200)
    )
    assert jnp.abs(difference[0, -1]).max() > 1e-2


def test_qwen_slides_from_max_window_layers_on_and_only_when_told():
    sliding = {"use_sliding_window": True, "sliding_window": 48, "max_window_layers": 2}
    windows = lambda values: [b.spec.window for b in abstract_model(QWEN2 | values, jnp.float32).blocks]  # noqa: E731
    assert windows(sliding) == [None, None, 48]
    assert windows(sliding | {"use_sliding_window": False}) == [None, None, None]
    with pytest.raises(BadInput, match="sliding_attention layers without a sliding_window"):
        windows({"layer_types": ["sliding_attention"] * 3})


def test_jit_takes_other_weights_without_tracing_again():
    traces = 0

    @jax.jit
    def logits(model, tokens):
        nonlocal traces
        traces += 1
        return reference_forward(model, tokens)

    first, second = (logits(random_model(LLAMA, seed=seed), tokens()) for seed in (1, 2))
    assert traces == 1
    assert jnp.abs(first - second).max() > 0.1


def test_equal_blocks_share_one_compiled_layer():
    traces = 0

    @jax.jit
    def project(block, x):
        nonlocal traces
        traces += 1
        return block.project(x)

    model = random_model(LLAMA)
    x = model.embed(tokens())
    for block in model.blocks:
        project(block, x)
    assert traces == 1


def test_gradients_come_as_a_model_and_match_finite_differences():
    model = random_model(LLAMA)

    def loss(model):
        logits = jax.nn.log_softmax(reference_forward(model, tokens(12)))
        return -jnp.mean(jnp.take_along_axis(logits[:, :-1], tokens(12)[:, 1:, None], axis=-1))

    gradient = jax.jit(jax.grad(loss))(model)
    assert jax.tree.structure(gradient) == jax.tree.structure(model)
    direction = gradient.blocks[0].attention.qkv.kernel[...]
    step = 1e-2 / jnp.linalg.norm(direction)
    ends = []
    for sign in (-1, 1):
        moved = jax.tree.map(lambda x: x, model)
        moved.blocks[0].attention.qkv.kernel.set_value(
            model.blocks[0].attention.qkv.kernel[...] + sign * step * direction
        )
        ends.append(loss(moved))
    slope = (ends[1] - ends[0]) / (2 * step)
    # A float32 difference of a loss near 6 keeps about two digits.
    np.testing.assert_allclose(slope, jnp.sum(direction**2), rtol=2e-2)


def test_frequencies_are_leaves_that_are_not_parameters():
    model = random_model(LLAMA)
    variables = jax.tree.leaves(model.blocks[0], is_leaf=lambda x: isinstance(x, RotaryConstant))
    assert sum(isinstance(variable, RotaryConstant) for variable in variables) == 1


def test_a_block_sharded_by_heads_talks_only_to_add_up_its_outputs():
    """Fused q, k, v and gate, up keep their parts on separate axes: splitting them moves nothing between devices."""
    if jax.device_count() < 4:
        pytest.skip("needs 4 devices (XLA_FLAGS=--xla_force_host_platform_device_count=8)")
    mesh = Mesh(np.asarray(jax.devices()[:4]), "tensor")

    def sharded(variable):
        names = getattr(variable, "axes", None) or (None,) * variable.ndim
        spec = PartitionSpec(*("tensor" if name in ("kv_heads", "heads", "mlp") else None for name in names))
        placed = jax.ShapeDtypeStruct(variable.shape, variable.dtype, sharding=NamedSharding(mesh, spec))
        return variable.replace(placed)

    config = LLAMA | {"num_attention_heads": 8, "num_key_value_heads": 4, "attention_bias": True}
    block = abstract_model(config, jnp.float32).blocks[0]
    block = jax.tree.map(sharded, block, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    x = jax.ShapeDtypeStruct((1, 6, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))

    def layer(block, x):
        q, k, v = block.project(x)
        return block.finish(x, q * (k * v).repeat(2, axis=2))

    text = jax.jit(layer).lower(block, x).compile().as_text()
    moves = ("all-gather", "all-to-all", "collective-permute", "all-reduce")
    counts = {move: len(re.findall(rf" {move}(?:-start)?\(", text)) for move in moves}
    assert counts == {"all-gather": 0, "all-to-all": 0, "collective-permute": 0, "all-reduce": 2}


def test_bfloat16_stays_bfloat16_inside_and_float32_outside():
    model = random_model(LLAMA, dtype=jnp.bfloat16)
    x = model.embed(tokens())
    q, k, v = model.blocks[0].project(x)
    assert {a.dtype for a in (x, q, k, v, model.blocks[0].finish(x, q))} == {jnp.dtype(jnp.bfloat16)}
    assert model.blocks[0].finish(x, q.astype(jnp.float32)).dtype == jnp.bfloat16
    logits = model.unembed(x)
    assert logits.dtype == jnp.float32
    exact = reference_forward(random_model(LLAMA), tokens())
    # 3 layers of roundings at 2^-9 relative each; logits have a spread of 1.
    assert jnp.abs(reference_forward(model, tokens()) - exact).max() < 0.2
