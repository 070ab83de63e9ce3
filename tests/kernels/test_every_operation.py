"""Every operation by every implementation: the float32 reference over its lists of shapes, and what compilers say.

What an operation is beyond that is claimed in a file of its own.
"""

from importlib.util import find_spec

import jax
import jax.numpy as jnp
import pytest

from kvx.eval.bench_kernels.ahead_of_time import compile_calls
from kvx.eval.bench_kernels.calls import Call, calls, implementations, operations
from kvx.eval.bench_kernels.numerics import error
from kvx.kernels.arg_spec import CHIPS, ArgSpec
from kvx.kernels.decode_attention import decode_attention, mosaic_tpu
from kvx.kernels.decode_attention.arg_specs import build
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
DECODE = {
    "rows": build("f32", (2, 2, 3, 200, 128), masked="both", dtype=jnp.float32),
    "turned": build("f32 turned", (1, 8, 1, 256, 64), masked="both", dtype=jnp.float32, length=3, bias=True, tail=9),
    "int8": build("int8", (1, 1, 8, 160, 128), dtype=jnp.float32),
    "fp8": build("fp8", (1, 1, 2, 128, 128), dtype=jnp.float32, masked="positions"),
    "int4": build("int4", (2, 1, 3, 512, 64), dtype=jnp.float32, masked="both", tail=17, group=32),
    "int4 and ranges turned": build("int4", (1, 3, 2, 32 * 192, 64), masked="lengths", dtype=jnp.float32, group=32),
    "int2": build("int2", (1, 2, 2, 512, 128), dtype=jnp.float32),
    "uint8": build("uint8", (1, 1, 2, 256, 64), dtype=jnp.float32, group=32, masked="positions"),
    "by slot": build("int4", (1, 1, 2, 256, 64), dtype=jnp.float32, group=32, masked="positions", keys_of="slots"),
}


def prefill(unit: int, dim: int) -> tuple[Call, ...]:
    """Every kind of mask in two or three blocks of `unit` tokens."""
    kinds = (
        ("causal", (1, 2, 3, 0), {"ragged": True}),
        ("window and cap", (1, 2, 4, 0), {"window": 2 * unit, "softcap": 4.0}),
        ("documents after past slots", (2, 1, 3, 1), {"documents": 2, "ragged": True}),
    )
    return tuple(
        Call("prefill_attention", prefill_attention, small(name, shape, jnp.float32, **more))
        for name, (batch, group, length, past), more in kinds
        for shape in [(batch, 2, group, length * unit, past * unit // 2, dim)]
    )


def by_tpu_interpreter() -> list:
    """Calls, and tunings that cut them into several blocks."""
    # Sums of up to 512 terms, codes' scales applied to other factors than the reference's.
    specs = [ArgSpec(name, arrays, {"scale": 0.1}, 5e-5) for name, arrays in DECODE.items()]
    found = [(Call("decode_attention", decode_attention, spec), mosaic_tpu.Tuning(128)) for spec in specs]
    found += [(call, prefill_tpu.Tuning(128, 128)) for call in prefill(64, 64)]
    for call in NUMERIC:
        own = call.operation in ("decode_attention", "prefill_attention")
        # On a TPU the slots of latents are last, and pages are whole tiles.
        options = {"slots_last": True, "page": 8} | dict(call.spec.options)
        taken = options["slots_last"] and options["page"] > 1
        if taken and not own and "mosaic_tpu" in implementations(call.operation):
            found.append((call, None))
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
