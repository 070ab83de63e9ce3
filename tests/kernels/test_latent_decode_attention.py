"""Latent decode attention: every implementation equals the float32 reference, which equals attention of plain keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvx.kernels.decode_attention import decode_attention
from kvx.kernels.implementations import compiling_for
from kvx.kernels.latent_decode_attention import CodedRows, latent_decode_attention, triton
from kvx.kernels.latent_decode_attention.arg_specs import CI, NUMERIC
from kvx.kernels.latent_decode_attention.operands import slots_first
from kvx.kernels.quantize_pack.coded import TokenCodes
from tests.kernels.unchecked import unchecked

FAST = [spec for spec in NUMERIC if spec.argument_bytes() < 2**19]
ON_GPU = jax.default_backend() == "gpu"


def rows_of(seed, batch, slots, dim):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((batch, slots, dim)), jnp.float32)


@pytest.mark.parametrize(
    ("batch", "slots", "heads", "widths", "length", "seed"),
    [
        (2, 9, 3, (16, 32), 3, 1),
        (1, 1, 1, (8, 0), 1, 2),
        pytest.param(4, 40, 9, (64, 32), 2, 3, marks=pytest.mark.slow),
        pytest.param(3, 33, 2, (8, 0), 3, 4, marks=pytest.mark.slow),
        pytest.param(3, 2, 4, (16, 32), 1, 5, marks=pytest.mark.slow),
    ],
)
def test_rows_are_keys_and_their_ends_are_values(batch, slots, heads, widths, length, seed):
    """Against attention with keys and values of their own: one KV head, the values cut off the keys."""
    latent, rotary = widths
    rows = rows_of(seed, batch, slots, rotary + latent)
    queries = jnp.asarray(np.random.default_rng(seed + 1).standard_normal((batch, length, heads, rotary + latent)))
    queries = queries.astype(jnp.float32)
    last = np.random.default_rng(seed).integers(-1, slots, (batch, 1))
    spots = jnp.asarray(np.where(last < 0, -1, np.maximum(last + np.arange(1 - length, 1), -1)), jnp.int32)
    places = jnp.broadcast_to(jnp.arange(slots), (batch, slots))
    wanted = decode_attention(
        jnp.swapaxes(queries, 1, 2)[:, None],
        rows[:, None],
        rows[:, None, :, rotary:],
        spots,
        places[:, None],
        scale=0.3,
    )
    attend = jax.jit(latent_decode_attention, static_argnames=("value_dim", "scale", "slots_last"))
    given_places = attend(queries, rows, spots, places, value_dim=latent, scale=0.3)
    in_order = attend(queries, jnp.swapaxes(rows, 1, 2), spots, value_dim=latent, scale=0.3, slots_last=True)
    # Float32 sums of at most 96 terms in another order.
    for part in (given_places, in_order):
        np.testing.assert_allclose(part.out, jnp.swapaxes(wanted.out[:, 0], 1, 2), atol=1e-5)
        np.testing.assert_allclose(part.lse, jnp.swapaxes(wanted.lse[:, 0], 1, 2), atol=1e-5)


@pytest.mark.sampled
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_coded_rows_are_rotary_keys_beside_what_their_codes_stand_for(bits):
    rows = rows_of(0, 2, 10, 96)
    codes = TokenCodes.encode(rows[:, None, :, 32:], bits, group=32)
    shown = slots_first(CodedRows(rows[..., :32], codes), slots_last=False)
    np.testing.assert_array_equal(shown[..., :32], rows[..., :32])
    step = np.repeat(np.swapaxes(np.asarray(codes.scale[:, 0]), 1, 2), 32, axis=-1)
    # Half a step, and the rounding of c s + m in float32.
    assert (np.abs(shown[..., 32:] - rows[..., 32:]) <= step / 2 + 1e-6).all()


def test_a_bias_of_log_n_is_a_slot_held_n_times():
    rows = rows_of(1, 1, 3, 24)
    queries = rows_of(2, 1, 4, 24)[:, None]
    spots = jnp.full((1, 1), 9, jnp.int32)
    thrice = rows[:, jnp.asarray([0, 1, 1, 1, 2])]
    wanted = latent_decode_attention(queries, thrice, spots, value_dim=16, scale=1.0)
    bias = jnp.log(jnp.asarray([[1.0, 3.0, 1.0]]))
    found = latent_decode_attention(queries, rows, spots, bias=bias, value_dim=16, scale=1.0)
    np.testing.assert_allclose(found.out, wanted.out, atol=2e-6)
    np.testing.assert_allclose(found.lse, wanted.lse, atol=2e-6)


def call(**changes):
    arrays = dict(queries=jnp.zeros((1, 1, 4, 48)), rows=jnp.zeros((1, 8, 48)), query_positions=jnp.zeros((1, 1), int))
    return latent_decode_attention(**arrays | dict(value_dim=16, scale=1.0) | changes)


def coded(bits=8, heads=1, nested=False, slots_last=False):
    words, ranges = jnp.zeros((1, heads, bits // 2, 8), jnp.uint32), jnp.zeros((1, heads, 1, 8), jnp.uint32)
    return CodedRows(
        jnp.zeros((1, 32, 8) if slots_last else (1, 8, 32)), TokenCodes(words, ranges, bits, words if nested else None)
    )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (dict(queries=jnp.zeros((1, 1, 4, 40))), "queries have 40 channels, allowed: the 48 of rows"),
        (dict(value_dim=49), "value_dim is 49, allowed: 1 to the 48"),
        (dict(key_positions=jnp.zeros((1, 9), int)), r"key_positions has shape \(1, 9\), allowed is \(1, 8\)"),
        (dict(bias=jnp.zeros((2, 8))), r"bias has shape \(2, 8\), allowed is \(1, 8\)"),
        (dict(rows=jnp.zeros((2, 8, 48))), r"rows has shape \(2, 8, 48\), allowed is \(1, any, any\)"),
        (dict(query_positions=jnp.zeros((1, 2), int)), r"query_positions has shape \(1, 2\), allowed is \(1, 1\)"),
        (dict(window=0), "window is 0, allowed are None and integers from 1 up"),
        (dict(softcap=-1.0), "softcap is -1.0, allowed are None and numbers above 0"),
        (
            dict(rows=jnp.zeros((1, 48, 8), jnp.float16), slots_last=True, implementation="mosaic_tpu"),
            "rows has dtype float16, it takes bfloat16 and float32",
        ),
        (dict(rows=coded(), value_dim=12), "value_dim is 12, allowed with coded rows: their 16"),
        (dict(rows=coded(heads=2)), r"codes.words has shape \(1, 2, 4, 8\), allowed is \(1, 1, any, 8\)"),
        (dict(rows=coded(nested=True)), "codes have lower codes, allowed: None"),
        (
            dict(rows=coded(4, slots_last=True), slots_last=True, implementation="mosaic_tpu"),
            "codes have 4 bits, it takes 8",
        ),
        (dict(implementation="mosaic_gpu"), "implementation is 'mosaic_gpu', latent_decode_attention has"),
        (dict(rows=coded(), implementation="mosaic_tpu"), "coded rows need slots_last=True"),
        (dict(implementation="mosaic_tpu"), "rows have 48 channels along the lanes, it takes multiples of 128 or"),
        (
            dict(implementation="triton", tuning=triton.Tuning(rows=24, interpret=True)),
            "a block of 24, it takes powers",
        ),
        (
            dict(rows=jnp.zeros((1, 48, 8)), slots_last=True, implementation="mosaic_tpu", tuning=triton.Tuning()),
            "it takes its own Tuning",
        ),
    ],
)
def test_what_cannot_run_is_refused_with_a_sentence(changes, sentence):
    with unchecked(), pytest.raises(ValueError, match=sentence):
        call(**changes)


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="this jax is new enough")
def test_an_old_jax_is_refused_by_name():
    with pytest.raises(ValueError, match=r"jax is 0\.10.*need 0\.11 or later"):
        call(implementation="triton")


def test_no_name_picks_the_kernel_where_it_can_run():
    spec = CI[0]
    inputs = spec.described()
    with compiling_for("tpu"):
        jaxpr = jax.make_jaxpr(lambda leaves: latent_decode_attention(**inputs.of(leaves), **spec.options))(
            inputs.shapes
        )
    assert "pallas_call" in str(jaxpr)
