"""Prefill attention: the blocked form against the plain one, what its statistics must add up to, and what is refused.

Its kernels for accelerators are tested in `test_prefill_kernels.py`, its derivative in `test_prefill_gradients.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvx.kernels.logits import SHARED
from kvx.kernels.prefill_attention import prefill_attention
from kvx.kernels.prefill_attention.columns import MAX, SQUARE, SUM, Column
from tests.kernels.unchecked import unchecked

VOTE = Column(last=0.2, rise=1.2)
COLUMNS = (
    *(SUM, SQUARE, MAX, Column(power=2, pooled=True), Column(near=0.3), Column(reduce="max", pooled=True)),
    *(VOTE, Column(power=2, reduce="max", last=0.4, rise=2.0)),
)


def case(batch, kv_heads, group, length, past, dim, lengths, seed=0):
    """Random operands; each row's padding and its past's empty slots are at position -1."""
    random = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(random.standard_normal(shape), jnp.float32)

    index = np.arange(length)
    new = np.where(index < np.asarray(lengths)[:, None], past + index, -1)
    old = np.broadcast_to(
        np.where(random.random((batch, kv_heads, past)) < 0.8, np.arange(past), -1), (batch, kv_heads, past)
    )
    spots = np.concatenate([old, np.broadcast_to(new[:, None], (batch, kv_heads, length))], axis=-1)
    return (
        normal(batch, kv_heads, group, length, dim),
        normal(batch, kv_heads, past + length, dim),
        normal(batch, kv_heads, past + length, dim),
        jnp.asarray(new, jnp.int32),
        jnp.asarray(spots, jnp.int32),
    )


@settings(deadline=None, max_examples=6)
@given(
    st.sampled_from([(1, 1, 1), (2, 2, 3), (1, 3, 2), (3, 1, 4)]),
    st.sampled_from([(1, 0), (5, 0), (130, 0), (300, 0), (64, 40), (200, 130)]),
    st.sampled_from([None, 7, 100]),
    st.sampled_from([None, 3.0]),
    st.integers(0, 1000),
)
def test_blocked_equals_reference(heads, shape, window, softcap, seed):
    batch, kv_heads, group = heads
    length, past = shape
    lengths = np.random.default_rng(seed).integers(1, length + 1, batch)
    operands = case(batch, kv_heads, group, length, past, 16, lengths, seed)
    options = {"scale": 0.3, "window": window, "softcap": softcap, "columns": COLUMNS}
    options["lengths"] = jnp.asarray(lengths, jnp.int32)
    plain = prefill_attention(*operands, **options, implementation="reference")
    fast = prefill_attention(*operands, **options, implementation="xla")
    for ours, theirs in zip(jax.tree.leaves(fast), jax.tree.leaves(plain), strict=True):
        # Float32 sums over up to 430 keys in another order.
        np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), atol=3e-5, rtol=1e-4)


def test_padding_sees_nothing_and_counts_nowhere():
    operands = case(2, 2, 2, 200, 0, 16, [200, 31])
    out, lse, columns = prefill_attention(*operands, scale=0.25, columns=(SUM,))
    assert not np.asarray(out[1, :, :, 31:]).any() and (np.asarray(lse[1, :, :, 31:]) == -np.inf).all()
    assert not np.asarray(columns[SUM][1, :, :, 31:]).any()


def test_column_mass_sums_to_the_number_of_queries():
    operands = case(2, 2, 3, 300, 0, 16, [300, 120])
    _, _, columns = prefill_attention(*operands, scale=0.25, columns=(SUM,))
    np.testing.assert_allclose(
        np.asarray(columns[SUM].sum(-1)), np.broadcast_to([[[300]], [[120]]], (2, 2, 3)), rtol=1e-5
    )


def test_statistics_of_two_chunks_combine_to_those_of_the_whole():
    queries, keys, values, spots, positions = case(1, 2, 2, 256, 0, 16, [256])
    options = {"scale": 0.25, "columns": COLUMNS, "lengths": jnp.asarray([256], jnp.int32)}
    _, _, whole = prefill_attention(queries, keys, values, spots, positions, **options)
    half = 128
    _, _, first = prefill_attention(
        queries[:, :, :, :half],
        keys[:, :, :half],
        values[:, :, :half],
        spots[:, :half],
        positions[..., :half],
        **options,
    )
    _, _, second = prefill_attention(queries[:, :, :, half:], keys, values, spots[:, half:], positions, **options)
    for column in COLUMNS:
        padded = jnp.pad(first[column], ((0, 0), (0, 0), (0, 0), (0, half)))
        np.testing.assert_allclose(column.combine(padded, second[column]), whole[column], atol=1e-5)


def test_a_near_statistic_is_the_band_of_the_probabilities():
    """Uniform attention: key j of n gets sum over i in [j, j + w) of 1 / (i + 1)."""
    queries, keys, values, spots, positions = case(1, 1, 1, 40, 0, 16, [40])
    near = Column(near=0.3)
    _, _, found = prefill_attention(
        queries * 0, keys, values, spots, positions, scale=0.25, columns=(near,), lengths=jnp.asarray([40], jnp.int32)
    )
    wanted = [sum(1 / (i + 1) for i in range(j, min(j + 12, 40))) for j in range(40)]
    np.testing.assert_allclose(np.asarray(found[near])[0, 0, 0], wanted, rtol=1e-5)


def test_a_vote_of_the_last_queries_weighs_their_rows():
    """Uniform attention over 40 tokens: rows 31 to 39 say 1 / (i + 1) of every key up to i, weights 1 to 1.2."""
    queries, keys, values, spots, positions = case(1, 1, 1, 40, 0, 16, [40])
    _, _, found = prefill_attention(
        queries * 0, keys, values, spots, positions, scale=0.25, columns=(VOTE,), lengths=jnp.asarray([40], jnp.int32)
    )
    rows = np.tril(np.ones((40, 40))) / np.arange(1, 41)[:, None]
    np.testing.assert_allclose(np.asarray(found[VOTE])[0, 0, 0], np.linspace(1, 1.2, 9) @ rows[31:], rtol=1e-5)


def test_every_query_sees_the_keys_of_the_shared_label():
    """Prefix, two contexts: the same as the table of the next test."""
    operands = case(1, 1, 2, 90, 0, 16, [90])
    labels = np.repeat([SHARED, 1, 2], [30, 40, 20])[None]
    table = jnp.asarray([[1, 0, 0], [1, 1, 0], [1, 0, 1]], bool)
    outs = []
    for names, visibility in ((labels, None), (np.maximum(labels, 0), table)):
        names = jnp.asarray(names, jnp.int32)
        outs.append(prefill_attention(*operands, scale=0.25, segments=(names, names), visibility=visibility)[0])
    np.testing.assert_array_equal(*map(np.asarray, outs))


def test_documents_do_not_see_each_other():
    queries, keys, values, spots, positions = case(1, 1, 2, 96, 0, 16, [96])
    labels = jnp.asarray(np.repeat([0, 1], [40, 56])[None], jnp.int32)
    out, _, _ = prefill_attention(queries, keys, values, spots, positions, scale=0.25, segments=(labels, labels))
    alone, _, _ = prefill_attention(
        queries[:, :, :, 40:], keys[:, :, 40:], values[:, :, 40:], spots[:, 40:], positions[..., 40:], scale=0.25
    )
    np.testing.assert_allclose(np.asarray(out[:, :, :, 40:]), np.asarray(alone), atol=1e-5)


def test_a_table_says_which_label_sees_which():
    """Two contexts behind one prefix: each sees the prefix and itself."""
    queries, keys, values, spots, positions = case(1, 1, 2, 90, 0, 16, [90])
    labels = jnp.asarray(np.repeat([0, 1, 2], [30, 40, 20])[None], jnp.int32)
    table = jnp.asarray([[1, 0, 0], [1, 1, 0], [1, 0, 1]], bool)
    out, _, _ = prefill_attention(
        queries, keys, values, spots, positions, scale=0.25, segments=(labels, labels), visibility=table
    )
    rows = np.r_[0:30, 70:90]
    alone, _, _ = prefill_attention(
        queries[:, :, :, rows], keys[:, :, rows], values[:, :, rows], spots[:, rows], positions[..., rows], scale=0.25
    )
    np.testing.assert_allclose(np.asarray(out[:, :, :, 70:]), np.asarray(alone[:, :, :, 30:]), atol=1e-5)


def operands(**shapes):
    """Operands of a fitting call, some of them in other shapes."""
    fitting = {"queries": (1, 2, 2, 8, 16), "keys": (1, 2, 8, 16), "values": (1, 2, 8, 16)} | shapes
    index = jnp.arange(8, dtype=jnp.int32)
    arrays = {name: jnp.zeros(shape, jnp.float32) for name, shape in fitting.items()}
    positions = jnp.broadcast_to(index, fitting["keys"][:3])
    return arrays | {"query_positions": index[None], "key_positions": positions, "scale": 1.0}


REFUSED = {
    "an implementation that there is not": (operands(), {"implementation": "cuda"}, "reference, xla, mosaic_tpu"),
    "a tuning of an implementation without one": (operands(), {"implementation": "xla", "tuning": 3}, "takes None"),
    "channels that a TPU kernel cannot take": (operands(), {"implementation": "mosaic_tpu"}, "16 channels"),
    "a statistic of near queries without lengths": (operands(), {"columns": (Column(near=0.5),)}, "lengths is None"),
    "heads that are not there": (operands(values=(1, 1, 8, 16)), {}, r"values has shape \(1, 1, 8, 16\), allowed is"),
    "positions of other queries": (
        operands() | {"query_positions": jnp.zeros((1, 7), jnp.int32)},
        {},
        r"query_positions has shape \(1, 7\), allowed is \(1, 8\)",
    ),
    "lengths of another batch": (operands(), {"lengths": jnp.ones(2, jnp.int32)}, r"lengths has shape \(2,\)"),
    "labels of other keys": (
        operands(),
        {"segments": (jnp.zeros((1, 8), jnp.int32), jnp.zeros((1, 9), jnp.int32))},
        r"segments of keys has shape \(1, 9\)",
    ),
    "a window that shows nothing": (operands(), {"window": 0}, "window is 0, allowed are None and integers from 1"),
    "a cap that is none": (operands(), {"softcap": 0.0}, "softcap is 0.0, allowed are None and numbers above 0"),
    "a table without labels": (operands(), {"visibility": jnp.ones((2, 2), bool)}, "segments is None"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_before_compilation(case):
    arguments, more, message = REFUSED[case]
    with unchecked(), pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: prefill_attention(**arguments, **more))


@pytest.mark.parametrize(
    ("of", "sentence"),
    [({"power": 3}, "power is 3, allowed are 1 and 2"), ({"reduce": "mean"}, "reduce is 'mean', allowed are 'sum'")],
)
def test_a_statistic_that_no_kernel_knows_is_refused_when_it_is_made(of, sentence):
    with pytest.raises(ValueError, match=sentence):
        Column(**of)


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="this jax has what Triton kernels need")
def test_triton_is_refused_on_an_older_jax():
    with pytest.raises(ValueError, match=r"need 0\.11 or later"):
        prefill_attention(**operands(), implementation="triton")
