"""Claims about the plain pass of training: it is that of the layer loop, whatever is scanned, kept or converted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvx.loop import attend, forward
from kvx.models.build import random_model
from kvx.train.forward import run
from tests.models.tiny_configs import CONFIGS

ROWS = jnp.asarray(np.random.default_rng(0).integers(0, 200, (2, 20)), jnp.int32)
SEGMENTS = jnp.tile(jnp.where(jnp.arange(20) < 7, 1, 2), (2, 1))
POSITIONS = jnp.tile(jnp.where(jnp.arange(20) < 7, jnp.arange(20), jnp.arange(20) - 7), (2, 1))
LATENT = {"heads": 4, "rank": 24, "rotary": 8, "content": 8, "value": 16, "scale": 0.25}


def latent(*layers):
    """A config whose named layers have latent attention."""
    entry = LATENT | {"frequencies": [1.0, 0.3, 0.1, 0.01], "magnitude": 1.0}
    return CONFIGS["llama2"] | {"kvx_mla": {"layers": {str(layer): entry for layer in layers}}}


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("llama3.2-tied", "qwen2-window", "gemma3", "latent")]


@pytest.mark.parametrize("name", ["hybrid", *SLOW])
def test_it_gives_the_logits_of_the_layer_loop(name):
    """Within float32 rounding of logits near 10; Gemma's windows make runs of equal layers between others."""
    config = {"latent": latent(0, 1, 2), "hybrid": latent(1)}.get(name) or CONFIGS[name]
    model = random_model(config, seed=1)
    found = jax.jit(lambda m: m.unembed(run(m, ROWS, SEGMENTS, POSITIONS).last))(model)
    np.testing.assert_allclose(found, forward(model, ROWS, SEGMENTS), atol=5e-5)


@pytest.mark.slow
def test_hidden_states_are_those_of_every_layer_and_the_last_layers_heads_are_rotated():
    model = random_model(CONFIGS["llama2"], seed=1)
    x, places, outputs = model.embed(ROWS), jnp.broadcast_to(jnp.arange(ROWS.shape[1]), ROWS.shape), []
    for block in model.blocks:
        x, _, _ = attend(block, x, places)
        outputs.append(x)
    for remat in ("none", "dots", "full"):
        found = run(model, ROWS, hidden=True, heads=True, remat=remat)
        np.testing.assert_allclose(found.hidden, np.stack(outputs), atol=5e-5)
        np.testing.assert_array_equal(found.hidden[-1], found.last)
    block, positions = model.blocks[-1], jnp.arange(20)[None, :, None]
    queries, keys, values = block.project(outputs[-2])
    expected = (block.rotary(queries, positions), block.rotary(keys, positions), values)
    for mine, right in zip((found.heads.queries, found.heads.keys, found.heads.values), expected, strict=True):
        np.testing.assert_allclose(mine, right, atol=5e-5)


def test_equal_layers_are_one_body_however_many_there_are():
    def size(layers):
        model = random_model(CONFIGS["llama2"] | {"num_hidden_layers": layers}, seed=1)
        return jax.jit(lambda m: run(m, ROWS).last).lower(model).as_text().count("\n")

    assert size(9) < size(3) * 1.3, "only the stacking grows"


@pytest.mark.slow
def test_recomputing_more_keeps_less():
    """Long rows of narrow heads, whose scores weigh more than what the projections leave."""
    model = random_model(CONFIGS["llama2"] | {"num_hidden_layers": 6}, seed=1)
    rows = jnp.zeros((1, 256), jnp.int32)

    def held(remat):
        def loss(m):
            return jnp.sum(run(m, rows, remat=remat).last)

        return jax.jit(jax.grad(loss, allow_int=True)).lower(model).compile().memory_analysis().temp_size_in_bytes

    none, dots, full = map(held, ("none", "dots", "full"))
    assert full < dots < 0.6 * none
