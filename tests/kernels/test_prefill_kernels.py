"""Prefill attention's kernels for accelerators: which blocks they visit, and what Triton's lower to.

Interpreted and compiled they are with every other operation's (`test_every_operation`).
"""

import contextlib
import itertools
from dataclasses import fields
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvx.eval.bench_kernels.calls import Call
from kvx.eval.bench_kernels.numerics import error
from kvx.kernels.logits import SHARED, same_segment, visible
from kvx.kernels.prefill_attention import prefill_attention
from kvx.kernels.prefill_attention.arg_specs import AOT, EVERY, NUMERIC
from kvx.kernels.prefill_attention.columns import Column
from kvx.kernels.prefill_attention.reach import causal_reaches, reaches
from kvx.kernels.prefill_attention.triton import Pass, Tuning

TRITON = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="Triton kernels need jax 0.11")
ON_GPU = pytest.mark.skipif(jax.default_backend() != "gpu", reason="runs the GPU's kernels for real")
BLOCKS = Tuning(Pass(32, 16, 4, 2), Pass(16, 32, 4, 2), Pass(16, 32, 4, 2), interpret=True)


@st.composite
def sights(draw):
    """Positions and labels of up to 40 queries after up to 20 slots; one shape, since each compiles anew."""
    length, past = 40, 20
    random = np.random.default_rng(draw(st.integers(0, 2**31)))
    real = random.integers(0, length + 1)
    index = np.arange(length)
    new = np.where(index < real, past + index, -1)
    old = np.where(random.random((2, past)) < 0.7, random.permutation(past), -1)
    spots = np.concatenate([old, np.broadcast_to(new, (2, length))], axis=1)
    segments = None
    if draw(st.booleans()):
        labels = np.sort(random.integers(SHARED, 3, length))
        segments = labels[None], np.concatenate([np.full(past, SHARED), labels])[None]
    return new[None], spots[None], segments


@settings(deadline=None, max_examples=60)
@given(sights(), st.sampled_from([None, 9]), st.sampled_from([(4, 4), (8, 16)]))
def test_reach_leaves_out_nothing_that_is_visible_and_calls_full_only_what_is(sight, window, blocks):
    tables, seen = looked_up(*sight, window, blocks)
    seen = np.asarray(seen)
    for table, size, other, mask in zip(tables, blocks, blocks[::-1], (seen, seen.swapaxes(-1, -2)), strict=True):
        check_table(np.asarray(table), size, other, mask)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 96), min_size=3, max_size=3), st.sampled_from([(4, 4), (16, 4), (4, 8)]))
def test_reach_of_whole_prompts_is_arithmetic(lengths, blocks):
    index, lengths = np.arange(96), np.asarray(lengths, np.int32)
    real = index < lengths[:, None]
    seen = ((index[:, None] >= index) & real[:, :, None] & real[:, None, :])[:, None]
    tables = arithmetic(lengths, blocks)
    for table, size, other, mask in zip(tables, blocks, blocks[::-1], (seen, seen.swapaxes(-1, -2)), strict=True):
        check_table(np.asarray(table), size, other, mask, tight=True)


@partial(jax.jit, static_argnums=(3, 4))
def looked_up(positions, spots, segments, window, blocks):
    """The tables, and the whole mask that they stand for."""
    seen = visible(positions[:, None, :, None], spots[:, :, None, :], window)
    if segments is not None:
        seen &= same_segment(*segments, None)[:, None]
    return reaches(positions, spots, segments, window, *blocks), seen


@partial(jax.jit, static_argnums=1)
def arithmetic(lengths, blocks):
    return causal_reaches(lengths, 96, *blocks)


def check_table(table, size, other, mask, *, tight=False):
    """Runs in order; all that is visible inside [first, end); everything visible inside [full, stop).

    Args:
        tight: no block is visited in vain.
    """
    assert (np.diff(table, axis=-1) >= 0).all()
    widths = [(0, 0)] * 2 + [(0, -mask.shape[2] % size), (0, -mask.shape[3] % other)]
    mask = np.pad(mask, widths)
    batch, heads, rows, columns = mask.shape
    tiles = mask.reshape(batch, heads, rows // size, size, columns // other, other)
    some, every = tiles.any(axis=(3, 5)), tiles.all(axis=(3, 5))
    for at in itertools.product(range(batch), range(heads), range(rows // size)):
        first, full, stop, end = table[at]
        assert not some[at][:first].any() and not some[at][end:].any()
        assert every[at][full:stop].all()
        if tight:
            assert some[at][first:end].all() and stop - full == every[at].sum()


@ON_GPU
@pytest.mark.parametrize("spec", [spec for spec in NUMERIC if "bf16" in spec.name], ids=str)
def test_triton_numeric_without_cudnn(spec):
    tuning = Tuning(Pass(64, 64, 4, 2), Pass(64, 64, 4, 2), cudnn=False)
    call = Call("prefill_attention", prefill_attention, spec)
    assert error(call, "triton", tuning=tuning) <= spec.tolerance


@TRITON
@pytest.mark.parametrize("spec", [NUMERIC[0], NUMERIC[-5], AOT[1], AOT[17]], ids=str)
def test_triton_lowers_for_cuda(spec):
    def attend(arrays):
        return prefill_attention(**arrays, **spec.options, implementation="triton")

    def forward(leaves):
        return attend(inputs.of(leaves))

    def backward(leaves):
        arrays = inputs.of(leaves)

        def loss(operands):
            out, lse, _ = attend(arrays | operands)
            return jnp.sum(out) + jnp.sum(lse)

        return jax.grad(loss)({name: arrays[name] for name in ("queries", "keys", "values")})

    inputs = spec.described()
    # Pooled statistics take a pass of their own.
    passes = 1 + len({column.pooled for column in spec.options["columns"]})
    # The derivative takes two, and the statistics, which nobody reads there, may be dropped.
    for function, kernels in ((forward, {passes}), (backward, {3, passes + 2})):
        with abstract_gpu():
            lowered = jax.jit(function).trace(inputs.shapes).lower(lowering_platforms=("cuda",))
        assert lowered.as_text().count("xla.gpu.triton") in kernels


def abstract_gpu():
    """A GPU to lower for where there is none."""
    if jax.default_backend() == "gpu":
        return contextlib.nullcontext()
    from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    return use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device))


def test_every_statistic_is_in_the_lists():
    """The numeric list covers each field of a statistic, and every two of them in one statistic."""
    departures = [
        {each.name for each in fields(Column) if getattr(column, each.name) != each.default} for column in EVERY
    ]
    for pair in itertools.combinations_with_replacement([each.name for each in fields(Column)], 2):
        assert any(departed.issuperset(pair) for departed in departures), pair
