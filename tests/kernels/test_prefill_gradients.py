"""The derivative of prefill attention: every implementation's against JAX's own of the plain form, merging included."""

from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvx.kernels.merge_partials import Partial, merge_partials
from kvx.kernels.prefill_attention import prefill_attention
from kvx.kernels.prefill_attention.arg_specs import NUMERIC
from kvx.kernels.prefill_attention.columns import SUM
from kvx.kernels.prefill_attention.triton import Pass, Tuning
from tests.kernels.interpreting import interpreted_without_races

TRITON = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="Triton kernels need jax 0.11")
IMPLEMENTATIONS = ["xla", pytest.param("triton", marks=TRITON), pytest.param("mosaic_tpu", marks=pytest.mark.slow)]
MASKS = {
    "causal": {},
    "window and cap": {"window": 9, "softcap": 2.0},
    "documents": {"documents": True},
    "past": {"past": 24},
    "ragged": {"lengths": [40, 13]},
}


def running(implementation):
    """Where an implementation runs: a TPU's kernels in their interpreter."""
    return interpreted_without_races() if implementation == "mosaic_tpu" else nullcontext()


def tuned(implementation):
    """Triton's kernels for real on a GPU, elsewhere interpreted in small blocks."""
    if implementation != "triton" or jax.default_backend() == "gpu":
        return {"implementation": implementation}
    small = Pass(16, 16, 4, 1)
    return {"implementation": implementation, "tuning": Tuning(small, small, small, interpret=True)}


def problem(lengths=(40, 40), past=0, documents=False, width=64, seed=0):
    """Queries, keys and values; and the arguments that say who sees whom."""
    random = np.random.default_rng(seed)
    batch, length = len(lengths), max(lengths)
    index = np.arange(length)
    new = np.where(index < np.asarray(lengths)[:, None], past + index, -1)
    old = np.broadcast_to(np.where(np.arange(past) % 5 == 0, -1, np.arange(past)), (batch, past))
    spots = np.concatenate([old, new], axis=1)
    where = {
        "query_positions": jnp.asarray(new, jnp.int32),
        "key_positions": jnp.broadcast_to(jnp.asarray(spots, jnp.int32)[:, None], (batch, 2, past + length)),
    }
    if documents:
        labels = jnp.broadcast_to(jnp.asarray(index // 15, jnp.int32), (batch, length))
        where["segments"] = (labels, labels)
    shapes = ((batch, 2, 3, length, width), *[(batch, 2, past + length, width)] * 2)
    return tuple(jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in shapes), where


def smooth(out, lse):
    """A loss of output and log-sum-exp; an empty row's -inf takes no part."""
    return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.where(jnp.isfinite(lse), jnp.cos(lse), 0.0))


def close(found, wanted):
    for ours, theirs in zip(found, wanted, strict=True):
        # Float32 sums over up to 64 keys in another order, and probabilities recomputed from the log-sum-exp.
        np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), atol=3e-5, rtol=2e-4)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("mask", MASKS)
def test_gradients_of_output_and_log_sum_exp_are_those_of_the_plain_form(implementation, mask):
    options = dict(MASKS[mask])
    masking = {"scale": 0.3, **{name: options.pop(name) for name in ("window", "softcap") if name in options}}
    arrays, where = problem(**options)

    def loss(arrays, **named):
        out, lse, _ = prefill_attention(*arrays, **where, **masking, **named)
        return smooth(out, lse)

    wanted = jax.grad(loss)(arrays, implementation="reference")
    with running(implementation):
        close(jax.grad(loss)(arrays, **tuned(implementation)), wanted)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("part", [0, 1])
def test_gradients_of_one_result_alone(implementation, part):
    """The other's cotangent is not there at all, which takes another path than zeros do."""
    arrays, where = problem()

    def loss(arrays, **named):
        return jnp.sum(jnp.sin(prefill_attention(*arrays, **where, scale=0.3, **named)[part]))

    wanted = jax.grad(loss)(arrays, implementation="reference")
    with running(implementation):
        close(jax.grad(loss)(arrays, **tuned(implementation)), wanted)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_through_a_merge_are_those_of_attention_over_all_keys(implementation):
    """Keys in two parts, each with its own softmax; without the log-sum-exp's cotangent this is off by a quarter."""
    (queries, keys, values), where = problem(past=24)
    where = where | {"query_positions": where["query_positions"]}

    def part(arrays, chosen, **named):
        queries, keys, values = arrays
        spots = jnp.where(chosen, where["key_positions"], -1)
        out, lse, _ = prefill_attention(queries, keys, values, where["query_positions"], spots, scale=0.3, **named)
        return Partial(out, lse)

    def merged(arrays):
        even = jnp.arange(keys.shape[2]) % 2 == 0
        named = tuned(implementation)
        both = merge_partials(part(arrays, even, **named), part(arrays, ~even, **named))
        return jnp.sum(jnp.sin(both.out))

    def whole(arrays):
        return jnp.sum(jnp.sin(part(arrays, True, implementation="reference").out))

    arrays = (queries, keys, values)
    with running(implementation):
        close(jax.grad(merged)(arrays), jax.grad(whole)(arrays))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_differentiating_a_statistic_is_refused(implementation):
    arrays, where = problem()

    def loss(arrays):
        columns = prefill_attention(*arrays, **where, scale=0.3, columns=(SUM,), implementation=implementation)[2]
        return jnp.sum(columns[SUM])

    with pytest.raises(ValueError, match="only output and log-sum-exp"):
        jax.grad(loss)(arrays)


def test_statistics_may_be_read_beside_a_derivative():
    arrays, where = problem()

    def loss(arrays, columns):
        out, _, found = prefill_attention(*arrays, **where, scale=0.3, columns=columns)
        return jnp.sum(jnp.sin(out)), found

    with_them, found = jax.grad(loss, has_aux=True)(arrays, (SUM,))
    close(with_them, jax.grad(loss, has_aux=True)(arrays, ())[0])
    assert float(found[SUM].sum()) == pytest.approx(2 * 6 * 40, rel=1e-5)


def test_derivatives_pass_through_jit_vmap_checkpoint_and_scan():
    """The same loss as four layers of a scanned, rematerialised model would take it."""
    arrays, where = problem()
    queries, keys, values = arrays

    def layer(x, weight):
        out, _, found = prefill_attention(x * weight, keys, values, **where, scale=0.3, columns=(SUM,))
        return out, jnp.mean(jax.lax.stop_gradient(found[SUM]))

    def scanned(weights):
        out, _ = jax.lax.scan(jax.checkpoint(layer), queries, weights)
        return jnp.sum(jnp.sin(out))

    def unrolled(weights):
        out = queries
        for index in range(2):
            out, _ = layer(out, weights[index])
        return jnp.sum(jnp.sin(out))

    weights = jnp.asarray([0.7, 1.3])
    found = jax.jit(jax.grad(scanned))(weights)
    np.testing.assert_allclose(found, jax.grad(unrolled)(weights), rtol=1e-5)
    batched = jax.vmap(jax.grad(unrolled))(jnp.stack([weights, weights]))
    np.testing.assert_allclose(batched[1], found, rtol=1e-5)


@pytest.mark.slow
def test_memory_of_the_backward_pass_grows_linearly_with_the_prompt():
    def temporaries(length):
        def shape(*dims, dtype=jnp.float32):
            return jax.ShapeDtypeStruct(dims, dtype)

        def loss(queries, keys, values, positions, spots):
            return jnp.sum(prefill_attention(queries, keys, values, positions, spots, scale=1.0)[0])

        keys = shape(1, 2, length, 32)
        integers = (shape(1, length, dtype=jnp.int32), shape(1, 2, length, dtype=jnp.int32))
        lowered = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(shape(1, 2, 1, length, 32), keys, keys, *integers)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    # Four times the tokens: linear is 4, quadratic 16.
    assert temporaries(4096) < 5 * temporaries(1024)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="runs the GPU's kernels for real")
@pytest.mark.parametrize("spec", [spec for spec in NUMERIC if "bf16" in spec.name], ids=str)
def test_triton_numeric_gradients_on_a_gpu(spec):
    inputs = spec.arrays()
    arrays = tuple(inputs.pop(name) for name in ("queries", "keys", "values"))
    options = {name: value for name, value in spec.options.items() if name != "columns"}

    def loss(arrays, implementation):
        wide = tuple(array.astype(jnp.float32) for array in arrays) if implementation == "reference" else arrays
        out, lse, _ = prefill_attention(*wide, **inputs, **options, implementation=implementation)
        return smooth(out, lse)

    found, wanted = (jax.grad(loss)(arrays, name) for name in ("triton", "reference"))
    for ours, theirs in zip(found, wanted, strict=True):
        ours, theirs = (np.asarray(array.astype(jnp.float32)) for array in (ours, theirs))
        # Logit cotangents, probabilities and results are each rounded to 8 bits; sums average what they add up.
        np.testing.assert_allclose(ours, theirs, atol=2e-2 * np.abs(theirs).max())
