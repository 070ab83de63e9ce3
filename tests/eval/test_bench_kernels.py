"""Claims about the kernel benchmark: what counts as wrong, as too much, and as bytes."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvx.errors import BadInput
from kvx.eval.bench_kernels import tables
from kvx.eval.bench_kernels.ahead_of_time import SMALL, Compiled, _moves
from kvx.eval.bench_kernels.calls import Call, calls, operations
from kvx.eval.bench_kernels.dense_peers import peer_times
from kvx.eval.bench_kernels.measure import Row, measure
from kvx.eval.bench_kernels.numerics import check, error
from kvx.kernels.arg_spec import ArgSpec


def build(key: jax.Array) -> dict:
    return {"x": jax.random.normal(key, (4, 8))}


def function(x, implementation=None):
    """Its "triton" is off by a hundredth, its "mosaic_tpu" has a number where the reference has none."""
    wrong = {"triton": 0.01 * jnp.max(jnp.abs(x)), "mosaic_tpu": jnp.zeros_like(x).at[0, 0].set(jnp.nan)}
    return x + wrong.get(implementation, 0.0)


CALL = Call("hadamard", function, ArgSpec("small", build, tolerance=0.02))


def test_an_error_is_relative_to_the_largest_value_and_nan_is_never_right():
    assert error(CALL, "xla") == 0
    assert error(CALL, "triton") == pytest.approx(0.01, rel=1e-4)
    assert error(CALL, "mosaic_tpu") == np.inf


def test_checks_name_what_is_wrong():
    found = {each.implementation: each for each in check([CALL], ("xla", "triton", "mosaic_tpu"))}
    assert found["xla"].good and found["triton"].good and not found["mosaic_tpu"].good
    strict = Call("hadamard", function, replace(CALL.spec, tolerance=0.001))
    assert not next(check([strict], ("triton",))).good
    assert "**wrong**" in tables.checked(found.values())


def test_inputs_count_once_and_outputs_once():
    assert CALL.spec.argument_bytes() == 4 * 8 * 4
    assert CALL.spec.bytes_moved(function) == 2 * 4 * 8 * 4
    assert replace(CALL.spec, moved=7).bytes_moved(function) == 7


def test_a_call_that_fails_is_a_row_without_a_time_and_the_next_is_measured():
    def fails(x, implementation=None):
        if implementation == "xla":
            raise ValueError("no room")
        return x

    rows = list(measure([Call("hadamard", fails, CALL.spec), CALL], 1e9, chosen=("xla",)))
    assert rows[0].seconds is None and "no room" in (rows[0].problem or "")
    assert rows[1].seconds and rows[1].moved == 256 and rows[1].of_copy == pytest.approx(256 / rows[1].seconds / 1e9)


def test_a_peer_that_cannot_run_says_why_and_the_others_are_asked():
    problem = {"B": 1, "H": 2, "G": 1, "T": 1, "S": 128, "D": 64, "causal": False}
    found = list(peer_times(problem))
    assert [name for name, _, _ in found] == ["cuDNN", "PyTorch SDPA", "PyTorch flex_attention"]
    assert all((seconds is None) != (reason is None) for _, seconds, reason in found)
    if jax.default_backend() != "gpu":
        assert all(reason for _, _, reason in found)


def test_a_peers_row_is_named_as_its_calls_rows_are():
    """The ratio is looked up by that name, which may be a function's of the operation's package."""
    problem = {"B": 1, "H": 2, "G": 1, "T": 1, "S": 128, "D": 64, "causal": False}
    call = Call("hadamard", function, replace(CALL.spec, function="other", compares=problem))
    rows = list(measure([call], 1e9, chosen=("xla",), peers=True))
    assert {row.operation for row in rows} == {"other"}
    assert [row.peer for row in rows] == [False, True, True, True]


def test_a_time_is_shown_beside_the_fastest_peers_on_the_same_call():
    rows = [
        Row("decode", "small", "triton", 3e-6, moved=64, of_copy=0.5),
        Row("decode", "small", "slow peer", 6e-6, peer=True),
        Row("decode", "small", "fast peer", 2e-6, peer=True),
        Row("decode", "small", "no peer", None, problem="not here", peer=True),
        Row("decode", "large", "triton", 3e-6),
    ]
    ratios = [line.split("|")[-2].strip() for line in tables.timed(rows).splitlines()[2:]]
    assert ratios == ["1.50", "3.00", "1.00", "", ""]


def test_a_moved_cache_a_temporary_and_a_refusal_are_not_good():
    fine = Compiled("decode", "small", "v5e", True, 200 * SMALL, 2 * SMALL)
    assert fine.good
    assert not replace(fine, temporary_bytes=2 * SMALL + 1).good, "above 1 % of the inputs"
    assert not replace(fine, moved=(("copy", 3 * SMALL),)).good
    assert not replace(fine, problem="no").good
    assert replace(fine, fits=False).good and "does not fit" in tables.compiled([replace(fine, fits=False)])


def test_copies_are_read_from_a_programs_text_and_fetches_are_none():
    copied = "  %c = bf16[2,64]{1,0:T(8,128)(2,1)} copy(bf16[2,64] %p)\n"
    added = "  %d = f32[8] add(f32[8] %a, f32[8] %b)\n"
    fetched = "  %e = bf16[2,64]{1,0:T(8,128)(2,1)S(1)} copy(bf16[2,64] %p)\n"
    body = "  %f = f32[4]{0} convert(%p)\n  ROOT %g = f32[2]{0} convert(%f)\n"
    fused = "%fused_computation.1 (p: f32[4]) -> f32[4] {\n" + body + "}\n"
    assert list(_moves(fused + "ENTRY %main {\n" + copied + added + fetched)) == [("convert", 8), ("copy", 256)]


def test_every_operation_lists_its_shapes_and_unknown_ones_are_refused():
    for name in operations():
        for which in ("NUMERIC", "AOT", "CI"):
            assert list(calls(which, (name,))), f"{name} has no {which}"
    with pytest.raises(BadInput, match="operation"):
        list(calls("CI", ("hadamart",)))
