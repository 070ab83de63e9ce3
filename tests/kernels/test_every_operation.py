"""Every operation by every implementation: the float32 reference over its lists of shapes, and what compilers say.

What an operation is beyond that is claimed in a file of its own.
"""

from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from kvx.eval.bench_kernels.ahead_of_time import compile_calls
from kvx.eval.bench_kernels.calls import Call, calls, implementations, operations
from kvx.eval.bench_kernels.numerics import error
from kvx.kernels.arg_spec import CHIPS, ArgSpec
from kvx.kernels.decode_attention import decode_attention, mosaic_tpu
from kvx.kernels.decode_attention.arg_specs import ROUNDED, build
from kvx.kernels.prefill_attention import mosaic_tpu as prefill_tpu
from kvx.kernels.prefill_attention import prefill_attention
from kvx.kernels.prefill_attention.arg_specs import small
from tests.kernels.interpreting import interpreted_without_races
from tests.kernels.lowering import NEW_ENOUGH, cuda_text

ON_GPU = jax.default_backend() == "gpu"
on_gpus = pytest.mark.skipif(not NEW_ENOUGH, reason="Pallas on GPUs needs jax 0.11")
NUMERIC = tuple(calls("NUMERIC"))
SMALLEST = [
    min((c for c in NUMERIC if c.operation == name), key=lambda c: c.spec.argument_bytes()) for name in operations()
]

# Interpreters take a second for a few blocks; of these two operations the list's shapes would take minutes.


def decode(name: str, kind: str, shape: tuple[int, ...], options: dict[str, Any] | None = None, **more: Any) -> Call:
    """In float32 off by sums of up to 512 terms, and by codes' scales that meet other factors than the reference's."""
    tolerance = ROUNDED if "dtype" in more else 5e-5
    spec = ArgSpec(
        name, build(kind, shape, **{"dtype": jnp.float32} | more), {"scale": 0.1} | (options or {}), tolerance
    )
    return Call("decode_attention", decode_attention, spec)


DECODE = (
    decode("rows", "f32", (2, 2, 3, 200, 128), masked="both"),
    decode("turned", "f32 turned", (1, 8, 1, 256, 64), masked="both", length=3, bias=True, tail=9),
    decode("int8", "int8", (1, 1, 8, 160, 128)),
    decode("int8 turned", "int8 turned", (1, 3, 2, 256, 64), masked="both", dtype=jnp.bfloat16),
    decode("fp8", "fp8", (1, 1, 2, 128, 128), masked="positions"),
    decode("fp8 turned", "fp8 turned", (2, 2, 2, 256, 64)),
    decode("int4", "int4", (2, 1, 3, 512, 64), masked="both", tail=17, group=32),
    decode("int4 and ranges turned", "int4", (1, 3, 2, 32 * 192, 64), masked="lengths", group=32),
    decode("int2", "int2", (1, 2, 2, 512, 128)),
    decode("uint8", "uint8", (1, 1, 2, 256, 64), group=32, masked="positions"),
    decode("by slot", "int4", (1, 1, 2, 256, 64), group=32, masked="positions", keys_of="slots"),
    decode(
        "window and cap, D 256", "bf16", (1, 2, 2, 256, 256), {"window": 100, "softcap": 2.0}, masked="positions",
        length=2, dtype=jnp.bfloat16,
    ),
    decode(
        "probabilities", "f32 turned", (1, 8, 2, 256, 64), {"probabilities": True}, masked="both", length=2, bias=True,
        tail=9,
    ),
    decode("probabilities of codes", "int4", (2, 2, 2, 512, 64), {"probabilities": True}, tail=17),
)  # fmt: skip


def prefill(unit: int, dim: int, dtype: Any = jnp.float32, **more: Any) -> tuple[Call, ...]:
    """Every kind of mask in two or three blocks of `unit` tokens."""
    kinds = (
        ("causal", (1, 2, 3, 0), {"ragged": True}),
        ("window and cap", (1, 2, 4, 0), {"window": 2 * unit, "softcap": 4.0}),
        ("documents after past slots", (2, 1, 3, 1), {"documents": 2, "ragged": True}),
    )
    return tuple(
        Call("prefill_attention", prefill_attention, small(f"{name} d{dim}", shape, dtype, **masks, **more))
        for name, (batch, group, length, past), masks in kinds
        for shape in [(batch, 2, group, length * unit, past * unit // 2, dim)]
    )


# What a TPU does not take: latents whose channels would be padded to its lanes, slots that are not whole tiles.
NOT_A_TPUS = {"latent_decode_attention": ("slots_last", False), "sparse_decode_attention": ("page", 1)}
LEFT_OUT = [call for call in NUMERIC if NOT_A_TPUS.get(call.operation) in call.spec.options.items()]


def by_tpu_interpreter() -> list:
    """Calls, and tunings that cut them into several blocks."""
    found: list = [(call, mosaic_tpu.Tuning(128)) for call in DECODE]
    # Head dims below, at and above the lanes; the latter two are never turned, values beside wider keys may be.
    wide = (*prefill(64, 128, jnp.bfloat16), prefill(64, 256)[1], prefill(64, 192, value_dim=128)[2])
    found += [(call, prefill_tpu.Tuning(128, 128)) for call in (*prefill(64, 64), *wide)]
    own = ("decode_attention", "prefill_attention")
    found += [
        (call, None)
        for call in NUMERIC
        if call.operation not in own and call not in LEFT_OUT and "mosaic_tpu" in implementations(call.operation)
    ]
    return [pytest.param(*each, id=str(each[0])) for each in found]


def by_triton() -> list:
    """For real on a GPU; elsewhere interpreted, in blocks so small that there are several and splits merge."""
    if ON_GPU:
        return [pytest.param(call, None, id=str(call)) for call in NUMERIC]
    if not NEW_ENOUGH:
        return []
    from kvx.kernels.decode_attention import triton as decode
    from kvx.kernels.hadamard import triton as hadamard
    from kvx.kernels.latent_decode_attention import triton as latent
    from kvx.kernels.page_scores import triton as page_scores
    from kvx.kernels.prefill_attention.triton import Pass, Tuning
    from kvx.kernels.quantize_pack import triton as quantize
    from kvx.kernels.ragged_decode_attention import triton as ragged

    tunings = {
        "decode_attention": [decode.Tuning(splits=splits, interpret=True) for splits in (1, 4)],
        "hadamard": [hadamard.Tuning(interpret=True)],
        "latent_decode_attention": [latent.Tuning(slots=64, splits=2, interpret=True)],
        "page_scores": [page_scores.Tuning(interpret=True)],
        "quantize_pack": [quantize.Tuning(interpret=True)],
        "ragged_decode_attention": [ragged.Tuning(split=128, interpret=True)],
        "sparse_decode_attention": [ragged.Tuning(split=128, interpret=True)],
    }
    found = [(call, tuning) for call in NUMERIC for tuning in tunings.get(call.operation, ())]
    blocks = Pass(32, 16, 4, 2), Pass(16, 32, 4, 2)
    found += [
        (call, Tuning(*blocks, ahead=ahead, interpret=True)) for call in prefill(16, 16) for ahead in (False, True)
    ]
    return [pytest.param(*each, id=f"{each[0]}, {place}") for place, each in enumerate(found)]


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(call, marks=[] if call in SMALLEST else pytest.mark.slow, id=str(call))
        for call in NUMERIC
    ],
)  # fmt: skip
def test_xla_is_the_reference(call):
    assert error(call, "xla") <= call.spec.tolerance


@pytest.mark.slow
@pytest.mark.parametrize(("call", "tuning"), by_tpu_interpreter())
def test_the_tpu_kernel_interpreted_is_the_reference(call, tuning):
    with interpreted_without_races():
        assert error(call, "mosaic_tpu", tuning=tuning) <= call.spec.tolerance


@pytest.mark.parametrize("call", LEFT_OUT, ids=str)
def test_what_a_tpu_does_not_take_is_refused(call):
    function, shapes = call.bound("mosaic_tpu")
    with pytest.raises(ValueError, match="mosaic_tpu"):
        jax.eval_shape(function, shapes)


@on_gpus
@pytest.mark.slow
@pytest.mark.parametrize(("call", "tuning"), by_triton())
def test_the_gpu_kernel_is_the_reference(call, tuning):
    assert error(call, "triton", tuning=tuning) <= call.spec.tolerance


@on_gpus
@pytest.mark.slow
@pytest.mark.parametrize("call", [*NUMERIC, *calls("CI"), *calls("GPU")], ids=str)
def test_the_gpu_kernel_lowers_for_cuda(call):
    """No GPU is needed to find what Triton cannot express."""
    assert "triton" in cuda_text(call.function, call.spec)


@pytest.mark.slow
@pytest.mark.aot
@pytest.mark.skipif(find_spec("libtpu") is None, reason="needs the TPU compiler: pip install kvx[aot]")
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("operation", [name for name in operations() if "mosaic_tpu" in implementations(name)])
def test_the_tpu_compiler_takes_real_shapes_and_moves_no_cache(operation, chip):
    for found in compile_calls(list(calls("CI", (operation,))), (chip,)):
        assert found.good, found
