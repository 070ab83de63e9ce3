"""Claims about decode attention: every implementation equals the float32 reference, on every kind of cache."""

import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvx.eval.bench_kernels import numerics
from kvx.eval.bench_kernels.calls import Call
from kvx.kernels.arg_spec import ArgSpec
from kvx.kernels.decode_attention import decode_attention, decode_probabilities, mosaic_tpu
from kvx.kernels.decode_attention.arg_specs import EXACT, build
from kvx.kernels.decode_attention.operands import Rows, Tail
from kvx.kernels.merge_partials import Partial, merge_partials
from kvx.kernels.quantize_pack.coded import ChannelCodes, TokenCodes
from tests.kernels.interpreting import interpreted_without_races
from tests.kernels.lowering import NEW_ENOUGH
from tests.kernels.unchecked import unchecked

ON_GPU = jax.default_backend() == "gpu"


def error(wanted: Partial, found: Partial) -> float:
    """Largest difference relative to the wanted output's, or log-sum-exp's, largest value; empty rows must agree."""
    worst = 0.0
    for expected, got in zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True):
        expected, got = np.asarray(expected), np.asarray(got)
        finite = np.isfinite(expected)
        assert np.array_equal(finite, np.isfinite(got)) and np.array_equal(expected[~finite], got[~finite])
        top = np.abs(expected[finite]).max(initial=0.0) or 1.0
        worst = max(worst, float(np.abs(expected[finite] - got[finite]).max(initial=0.0)) / top)
    return worst


@pytest.mark.slow
@hypothesis.given(
    kind=st.sampled_from(("f32", "f32 turned", "int8", "fp8", "int4", "int2", "uint8")),
    heads=st.sampled_from((1, 3)),
    group=st.sampled_from((1, 3)),
    slots=st.sampled_from((32, 96)),
    width=st.sampled_from((64, 128, 256)),
    length=st.sampled_from((1, 2)),
    masked=st.sampled_from(("", "lengths", "positions", "both")),
    tail=st.sampled_from((0, 5)),
    bias=st.booleans(),
)
@hypothesis.settings(max_examples=12, deadline=None)
def test_any_shape_and_mask_equals_the_reference(kind, heads, group, slots, width, length, masked, tail, bias):
    arrays = build(
        kind,
        (2, heads, group, slots, width),
        length=length,
        group=32,
        dtype=jnp.float32,
        masked=masked,
        tail=tail,
        bias=bias,
    )
    spec = ArgSpec("drawn", arrays, {"scale": width**-0.5})
    assert numerics.error(Call("decode_attention", decode_attention, spec), "xla") < 5 * EXACT


def call(kind: str = "f32", **more) -> dict:
    return jax.jit(build(kind, (2, 2, 3, 64, 64), dtype=jnp.float32, group=32, **more))(jax.random.key(3))


def attend(**arrays):
    """Compiled, as everything is that uses it."""
    static = {name: arrays.pop(name) for name in ("probabilities",) if name in arrays}
    return jax.jit(lambda arrays: decode_attention(**arrays, **static, scale=0.125))(arrays)


@pytest.mark.parametrize("kind", ["f32", "int4"])
def test_slots_behind_a_length_are_as_if_empty(kind):
    arrays = call(kind, masked="both")
    lengths = arrays.pop("lengths")
    index = jnp.arange(64)
    by_positions = arrays | {"key_positions": jnp.where(index < lengths[..., None], arrays["key_positions"], -1)}
    assert error(attend(**by_positions), attend(**arrays, lengths=lengths)) == 0


def test_a_bias_is_the_log_of_how_often_a_slot_counts():
    arrays = call(masked="positions")
    counts = jnp.where(jnp.arange(64) < 20, 2, 1)
    twice = {
        name: Rows(jnp.concatenate([arrays[name].array, arrays[name].array[:, :, :20]], axis=2))
        for name in ("keys", "values")
    }
    slots = jnp.concatenate([arrays["key_positions"], arrays["key_positions"][:, :, :20]], axis=2)
    found = attend(**arrays, bias=jnp.broadcast_to(jnp.log(counts), (2, 2, 64)).astype(jnp.float32))
    assert error(attend(**arrays | twice | {"key_positions": slots}), found) < EXACT


def test_a_tail_is_one_more_partial():
    arrays = call("int4", masked="positions", tail=7)
    tail = arrays.pop("tail")
    exact = {"keys": tail.keys, "values": tail.values, "key_positions": tail.positions}
    merged = merge_partials(attend(**arrays), attend(**arrays | exact))
    assert error(merged, attend(**arrays, tail=tail)) < EXACT


@pytest.mark.sampled
@pytest.mark.parametrize("kind", ["f32", "int4"])
def test_a_tpus_kernel_takes_query_rows_in_parts(kind, monkeypatch):
    """Of 48 rows the last 16 are a part of their own, which is not full."""
    arrays = jax.jit(
        build(kind, (1, 2, 24, 256, 128), dtype=jnp.float32, group=32, length=2, masked="both", tail=7, bias=True)
    )(jax.random.key(3))
    wanted, weights = attend(**arrays, probabilities=True)
    monkeypatch.setattr(mosaic_tpu, "_rows", lambda *_: 32)
    with interpreted_without_races():
        found = decode_attention(**arrays, scale=0.125, probabilities=True, implementation="mosaic_tpu")
        jax.block_until_ready(found)
    # Scales of codes are applied to other factors than XLA's.
    assert error(wanted, found[0]) < 5e-5 and np.allclose(found[1], weights, atol=1e-5)


@pytest.mark.sampled
@pytest.mark.parametrize("kind", ["f32", "int2"])
def test_probabilities_are_the_softmax_that_the_output_is_the_mean_under(kind):
    arrays = call(kind, masked="both", tail=7)
    part, weights = attend(**arrays, probabilities=True)
    seen = np.isfinite(np.asarray(part.lse))
    assert np.allclose(np.asarray(weights.sum(-1)), seen, atol=1e-5)  # sums of 71 float32 terms
    values = arrays["values"].array if kind == "f32" else jnp.swapaxes(arrays["values"].decode(), -1, -2)
    values = jnp.concatenate([values, arrays["tail"].values], axis=2)
    assert np.allclose(jnp.einsum("bgrtc,bgcv->bgrtv", weights, values), part.out, atol=1e-5)
    lengths = arrays.pop("lengths")
    limited = jnp.where(jnp.arange(64) < lengths[..., None], arrays["key_positions"], -1)
    arrays |= {"key_positions": limited}
    del arrays["values"]
    again = jax.jit(lambda arrays: decode_probabilities(**arrays, scale=0.125))(arrays | {"lse": part.lse})
    assert np.allclose(again, weights, atol=1e-6)


def test_numbers_of_8_bits_are_within_half_a_step():
    rows = jax.random.normal(jax.random.key(0), (1, 2, 9, 16))
    whole = Rows.encode(rows, jnp.int8)
    step = jnp.swapaxes(whole.scale, -1, -2)
    assert (jnp.abs(whole.array.astype(jnp.float32) * step - rows) <= step * 0.5001).all()
    floating = Rows.encode(rows, jnp.float8_e4m3fn, slots_last=True)
    assert floating.width == 16 and floating.slots == 9
    decoded = jnp.swapaxes(floating.array.astype(jnp.float32) * floating.scale, -1, -2)
    # Three bits of mantissa: half a step is a sixteenth; below the normal numbers, half of the least step.
    assert (jnp.abs(decoded - rows) <= jnp.abs(rows) / 16 + jnp.swapaxes(floating.scale, -1, -2) * 2.0**-10).all()


REFUSED = {
    "queries": jnp.zeros((2, 2, 3, 1, 64)),
    "keys": Rows(jnp.zeros((2, 2, 64, 64))),
    "values": Rows(jnp.zeros((2, 2, 64, 64))),
}
EVERY = jnp.zeros((2, 1), jnp.int32)


def tail(keys=(2, 2, 5, 64), values=(2, 2, 5, 64), positions=(2, 2, 5)) -> Tail:
    with unchecked():
        return Tail(jnp.zeros(keys), jnp.zeros(values), jnp.zeros(positions, jnp.int32))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"implementation": "cuda"}, "implementation is 'cuda'"),
        ({"window": 8}, "window is 8"),
        ({"softcap": -1.0}, "softcap is -1.0"),
        ({"bias": jnp.zeros((2, 2, 5))}, "bias has shape"),
        ({"key_positions": jnp.zeros((2, 2, 64), jnp.int32)}, "query_positions is None"),
        ({"values": Rows(jnp.zeros((2, 2, 32, 64)))}, "values has 32 slots"),
        ({"keys": Rows(jnp.zeros((2, 2, 64, 32)))}, "keys has rows of 32"),
        ({"keys": Rows(jnp.zeros((2, 2, 64, 64), jnp.int8), jnp.ones((2, 2, 1, 9)))}, "keys.scale has shape (2, 2, 1"),
        ({"values": ChannelCodes.encode(jnp.zeros((2, 2, 64, 64)), 4, 32)}, "values is ChannelCodes"),
        ({"keys": jnp.zeros((1, 2, 64, 64))}, "keys has an array of shape (1, 2, 64, 64), allowed are (2, 2, ...)"),
        ({"values": Rows(jnp.zeros((2, 1, 64, 64)))}, "values has an array of shape (2, 1, 64, 64)"),
        ({"query_positions": jnp.zeros((1, 1), jnp.int32)}, "query_positions has shape (1, 1), allowed is (2, 1)"),
        ({"tail": tail(positions=(2, 1, 5))}, "tail.positions has shape (2, 1, 5), allowed is (2, 2, any)"),
        ({"tail": tail(keys=(2, 2, 4, 64))}, "tail.keys has shape (2, 2, 4, 64), allowed is (2, 2, 5, 64)"),
        ({"tail": tail(values=(2, 2, 5, 32))}, "tail.values has shape (2, 2, 5, 32), allowed is (2, 2, 5, 64)"),
        ({"values": Rows(jnp.zeros((2, 2, 64, 64), jnp.int8))}, "values has int8 numbers and no scale"),
        ({"keys": Rows(jnp.zeros((2, 2, 64, 64), jnp.float8_e4m3fn))}, "keys has float8_e4m3fn numbers and no scale"),
        (
            {"query_positions": EVERY, "key_positions": jnp.zeros((2, 2, 64), jnp.int32), "window": 0},
            "window is 0, allowed are None and integers from 1 up",
        ),
        ({"queries": jnp.zeros((2, 2, 3, 1, 64), jnp.float16), "implementation": "mosaic_tpu"}, "dtype float16"),
        ({"implementation": "mosaic_tpu"}, "slots_last=True"),
        (
            {name: jnp.zeros((1, 150, 64, 128)) for name in ("keys", "values")}
            | {"queries": jnp.zeros((1, 150, 3, 8, 128)), "implementation": "mosaic_tpu"},
            "a block of 150 KV heads asks for",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(change, words):
    with unchecked(), pytest.raises(ValueError, match=re.escape(words)):
        decode_attention(**{"scale": 0.125} | REFUSED | change)


@pytest.mark.parametrize("implementation", ["mosaic_tpu", "triton"])
def test_kernels_name_the_codes_that_they_take(implementation):
    if implementation == "triton" and not NEW_ENOUGH:
        pytest.skip("Pallas on GPUs needs jax 0.11")
    rows = jnp.zeros((1, 1, 64, 64))
    arrays = {"queries": jnp.zeros((1, 1, 1, 1, 64)), "scale": 1.0, "implementation": implementation}
    with pytest.raises(ValueError, match="codes of 3 bits"):
        decode_attention(keys=ChannelCodes.encode(rows, 3, 32), values=TokenCodes.encode(rows, 3, 32), **arrays)
    nested = ChannelCodes.encode(rows, 4, 32, nested=True)
    with pytest.raises(ValueError, match="nested"):
        decode_attention(keys=nested, values=TokenCodes.encode(rows, 4, 32, nested=True), **arrays)


@pytest.mark.skipif(NEW_ENOUGH, reason="this jax has it")
def test_an_old_jax_is_refused_on_gpus():
    with pytest.raises(ValueError, match=r"need 0\.11 or later"):
        decode_attention(**REFUSED, scale=0.125, implementation="triton")
