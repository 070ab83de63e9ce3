"""Losses of distillation against dense float64 numpy, and what must not change them: chunks, padding, packing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from kvx.train.losses import (
    DIVERGENCES,
    LOGIT_LOSSES,
    by_chunks,
    cross_entropy,
    divergence,
    hidden_loss,
    log_probabilities,
    logit_losses,
    mean_over,
    next_tokens,
)
from kvx.train.preferences import dpo_loss
from kvx.train.relations import relation_loss

# Float32 sums of a few hundred terms near 1, against float64.
CLOSE = {"rtol": 2e-6, "atol": 2e-6}

RANDOM = np.random.default_rng(0)
BATCH, LENGTH, WIDTH, VOCABULARY = 2, 11, 8, 37


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(RANDOM.standard_normal(shape), jnp.float32)


STUDENT, TEACHER = normal(BATCH, LENGTH, WIDTH), normal(BATCH, LENGTH, WIDTH)
MATRIX = normal(WIDTH, VOCABULARY)
TOKENS = jnp.asarray(RANDOM.integers(0, VOCABULARY, (BATCH, LENGTH)), jnp.int32)
SEGMENTS = jnp.asarray([[1] * 5 + [2] * 6, [1] * 7 + [2] * 2 + [0] * 2], jnp.int32)
MASK = SEGMENTS > 0


def unembed(x):
    return (x @ MATRIX).astype(jnp.float32)


def wide(array) -> np.ndarray:
    return np.asarray(array).astype(np.float64)


def dense(kind: str, temperature: float) -> float:
    """A divergence by its formula, token by token, in float64."""
    z_s, z_t = (wide(side) @ wide(MATRIX) / temperature for side in (STUDENT, TEACHER))
    p, q = np.exp(log_softmax(z_t, axis=-1)), np.exp(log_softmax(z_s, axis=-1))
    total, count = 0.0, 0
    for row in range(BATCH):
        for t in range(LENGTH - 1):
            if SEGMENTS[row, t] == SEGMENTS[row, t + 1] and MASK[row, t + 1]:
                a, b = p[row, t], q[row, t]
                m = (a + b) / 2
                by_kind = {
                    "ce": lambda row=row, t=t: -log_softmax(z_s[row, t])[TOKENS[row, t + 1]],
                    "kl": lambda a=a, b=b: temperature**2 * np.sum(a * np.log(a / b)),
                    "reverse_kl": lambda a=a, b=b: temperature**2 * np.sum(b * np.log(b / a)),
                    "js": lambda a=a, b=b, m=m: temperature**2 * 0.5 * np.sum(a * np.log(a / m) + b * np.log(b / m)),
                }
                total, count = total + by_kind[kind](), count + 1
    return total / count


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_losses_of_logits_are_their_formulas(temperature):
    targets, counted = next_tokens(TOKENS, SEGMENTS, MASK)

    @jax.jit
    def losses(x, y):
        return logit_losses(x, unembed, targets, counted, LOGIT_LOSSES, y, unembed, temperature=temperature, chunk=6)

    found = losses(STUDENT, TEACHER)
    for kind in DIVERGENCES:
        np.testing.assert_allclose(found[kind], dense(kind, temperature), **CLOSE)
    np.testing.assert_allclose(found["ce"], dense("ce", 1.0), **CLOSE)


@pytest.mark.parametrize(
    "chunk", [pytest.param(1, marks=pytest.mark.slow), 6, pytest.param(1000, marks=pytest.mark.slow)]
)
def test_chunks_change_neither_values_nor_gradients(chunk):
    targets, counted = next_tokens(TOKENS, SEGMENTS, MASK)

    def chunked(x):
        found = logit_losses(x, unembed, targets, counted, LOGIT_LOSSES, TEACHER, unembed, chunk=chunk)
        return sum(found.values()), found

    def whole(x):
        guide = unembed(TEACHER)
        found = {kind: mean_over(divergence(unembed(x), guide, kind), counted) for kind in DIVERGENCES}
        found["ce"] = mean_over(cross_entropy(unembed(x), targets), counted)
        return sum(found.values()), found

    (_, one), gradient = jax.jit(jax.value_and_grad(chunked, has_aux=True))(STUDENT)
    (_, other), expected = jax.jit(jax.value_and_grad(whole, has_aux=True))(STUDENT)
    for name in LOGIT_LOSSES:
        np.testing.assert_allclose(one[name], other[name], rtol=1e-6)
    np.testing.assert_allclose(gradient, expected, atol=1e-6)  # the same sums in another order


def test_a_chunk_bounds_the_logits_that_exist():
    """Compiled memory of value and gradient: 64 tokens of 4096 at a time need a small part of all logits at once."""
    batch, length, vocabulary = 2, 2048, 512
    matrix = jax.ShapeDtypeStruct((WIDTH, vocabulary), jnp.float32)
    x = jax.ShapeDtypeStruct((batch, length, WIDTH), jnp.float32)
    goal = jax.ShapeDtypeStruct((batch, length), jnp.int32)

    def temporaries(chunk):
        def loss(x, y, matrix, goal):
            project = lambda h: h @ matrix  # noqa: E731 (one line, used twice)
            counted = jnp.ones_like(goal, bool)
            return logit_losses(x, project, goal, counted, ("kl",), y, project, chunk=chunk)["kl"]

        lowered = jax.jit(jax.grad(loss, argnums=(0, 2))).lower(x, x, matrix, goal)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    all_logits = batch * length * vocabulary * 4
    assert temporaries(64) < all_logits / 8
    assert temporaries(batch * length) > all_logits


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient(kind):
    def loss(z):
        return jnp.sum(divergence(z, logits, kind, 1.5))

    logits = unembed(STUDENT)
    value, gradient = jax.jit(jax.value_and_grad(loss))(logits)
    np.testing.assert_allclose(value, 0.0, atol=2e-5)  # rounding of log-softmax, 22 tokens
    np.testing.assert_allclose(gradient, 0.0, atol=1e-6)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_divergences_survive_logits_that_are_far_apart(kind):
    student, teacher = jnp.asarray([[200.0, 0.0, -200.0]]), jnp.asarray([[-200.0, 0.0, 200.0]])
    value, gradient = jax.jit(jax.value_and_grad(lambda z: divergence(z, teacher, kind)[0]))(student)
    assert np.isfinite(value) and np.all(np.isfinite(gradient))
    if kind == "js":
        np.testing.assert_allclose(value, np.log(2.0), rtol=1e-6)


def test_gradients_are_the_finite_differences():
    targets, counted = next_tokens(TOKENS, SEGMENTS, MASK)
    direction = normal(*STUDENT.shape)

    @jax.jit
    def loss(x):
        logits = logit_losses(x, unembed, targets, counted, LOGIT_LOSSES, TEACHER, unembed, temperature=1.7, chunk=4)
        heads = [side.reshape(BATCH, LENGTH, 2, WIDTH // 2) for side in (x, TEACHER)]
        hidden = hidden_loss(x[None], TEACHER[None], counted)
        return sum(logits.values()) + hidden + relation_loss(heads[0], heads[1], SEGMENTS, counted)

    step = 1e-2
    by_gradient = jnp.sum(jax.grad(loss)(STUDENT) * direction)
    by_difference = (loss(STUDENT + step * direction) - loss(STUDENT - step * direction)) / (2 * step)
    # The difference's own error: third derivatives times 1e-4, and float32 rounding of a loss near 20 over 2e-2.
    np.testing.assert_allclose(by_gradient, by_difference, rtol=2e-3, atol=1e-3)


def test_no_gradient_goes_into_the_teacher():
    targets, counted = next_tokens(TOKENS, SEGMENTS, MASK)

    def loss(y):
        found = logit_losses(STUDENT, unembed, targets, counted, DIVERGENCES, y, unembed)
        heads = [side.reshape(BATCH, LENGTH, 2, -1) for side in (STUDENT, y)]
        return (
            sum(found.values())
            + hidden_loss(STUDENT[None], y[None], counted)
            + relation_loss(heads[0], heads[1], SEGMENTS, counted)
        )

    np.testing.assert_array_equal(jax.jit(jax.grad(loss))(TEACHER), 0.0)


def test_only_positions_whose_next_token_is_of_their_document_count():
    targets, counted = next_tokens(TOKENS, SEGMENTS, MASK)
    np.testing.assert_array_equal(np.asarray(counted).sum(axis=1), [4 + 5, 6 + 1])
    rows, spots = np.nonzero(np.asarray(counted))
    np.testing.assert_array_equal(np.asarray(targets)[rows, spots], TOKENS[rows, spots + 1])
    assert not counted[0, 4] and not counted[0, 10] and not counted[1, 6] and not counted[1, 8]


def test_nothing_counted_is_zero_and_has_a_finite_gradient():
    targets, counted = next_tokens(TOKENS, jnp.zeros_like(SEGMENTS), jnp.zeros_like(MASK))

    def loss(x):
        found = logit_losses(x, unembed, targets, counted, LOGIT_LOSSES, TEACHER, unembed)
        return sum(found.values()) + hidden_loss(x[None], TEACHER[None], counted)

    value, gradient = jax.jit(jax.value_and_grad(loss))(STUDENT)
    assert value == 0
    np.testing.assert_array_equal(gradient, 0.0)


def test_padding_and_packing_change_no_value():
    """Two documents in one row, with padding of junk behind, cost what they cost in rows of their own."""
    length = 5
    alone = np.zeros((2, LENGTH), np.int32)
    alone[0, :5], alone[1, :6] = 1, 1
    x = np.zeros((2, LENGTH, WIDTH), np.float32)
    y, tokens = x.copy(), np.zeros((2, LENGTH), np.int32)
    for row, part in enumerate((slice(0, length), slice(length, LENGTH))):
        size = part.stop - part.start
        x[row, :size], y[row, :size], tokens[row, :size] = STUDENT[0, part], TEACHER[0, part], TOKENS[0, part]
    x[0, 5:], y[0, 5:], tokens[0, 5:] = 7.0, -3.0, 11

    @jax.jit
    def losses(x, y, tokens, segments):
        targets, counted = next_tokens(tokens, segments, segments > 0)
        found = logit_losses(x, unembed, targets, counted, LOGIT_LOSSES, y, unembed)
        heads = [side.reshape(*side.shape[:2], 2, -1) for side in (x, y)]
        return [
            *found.values(),
            hidden_loss(x[None], y[None], counted),
            relation_loss(heads[0], heads[1], segments, counted),
        ]

    whole = (jnp.concatenate([array[:1], jnp.zeros_like(array[:1])]) for array in (STUDENT, TEACHER, TOKENS, SEGMENTS))
    packed = losses(*whole)
    np.testing.assert_allclose(losses(*map(jnp.asarray, (x, y, tokens, alone))), packed, rtol=2e-6)


def test_hidden_states_of_other_widths_are_refused():
    with pytest.raises(ValueError, match="equal shapes"):
        hidden_loss(STUDENT[None], TEACHER[None, ..., :4], MASK)


def brute_relation(student, teacher, heads):
    """MiniLM's relation loss by loops, in float64; heads are cut anew from the width."""
    sides = [wide(side).reshape(BATCH, LENGTH, heads, -1) for side in (student, teacher)]
    total, count = 0.0, 0
    _, counted = next_tokens(TOKENS, SEGMENTS, MASK)
    for b, t in zip(*np.nonzero(np.asarray(counted)), strict=True):
        seen = [j for j in range(t + 1) if SEGMENTS[b, j] == SEGMENTS[b, t]]
        for head in range(heads):
            q, p = (
                log_softmax([side[b, t, head] @ side[b, j, head] / np.sqrt(side.shape[-1]) for j in seen])
                for side in sides
            )
            total += np.sum(np.exp(p) * (p - q))
        count += 1
    return total / (count * heads)


@pytest.mark.parametrize(
    ("heads_student", "heads_teacher", "relations"), [(4, 4, None), (4, 2, None), (4, 2, 8), (2, 4, 1)]
)
def test_relations_are_their_formula(heads_student, heads_teacher, relations):
    student = normal(BATCH, LENGTH, heads_student, 6)
    teacher = normal(BATCH, LENGTH, heads_teacher, 4)
    _, counted = next_tokens(TOKENS, SEGMENTS, MASK)
    found = jax.jit(relation_loss, static_argnames="heads")(student, teacher, SEGMENTS, counted, heads=relations)
    heads = relations or max(heads_student, heads_teacher)
    if relations is None:
        student, teacher = (np.repeat(side, heads // side.shape[2], axis=2) for side in (student, teacher))
    np.testing.assert_allclose(found, brute_relation(student, teacher, heads), rtol=1e-5)


def test_relations_do_not_see_an_orthogonal_turn_of_each_head():
    _, counted = next_tokens(TOKENS, SEGMENTS, MASK)
    values = normal(BATCH, LENGTH, 3, 6)
    turn = np.linalg.qr(RANDOM.standard_normal((3, 6, 6)))[0].astype(np.float32)
    turned = jnp.einsum("bthd,hde->bthe", values, turn)
    loss = jax.jit(relation_loss)
    np.testing.assert_allclose(loss(turned, values, SEGMENTS, counted), 0.0, atol=1e-6)
    assert loss(values[:, ::-1], values, SEGMENTS, counted) > 1e-2


def test_relations_refuse_heads_that_do_not_divide():
    ones = jnp.ones((BATCH, LENGTH, 3, 5))
    with pytest.raises(ValueError, match="divisor"):
        relation_loss(ones, ones[:, :, :2], SEGMENTS, MASK)
    with pytest.raises(ValueError, match="divisor"):
        relation_loss(ones, ones, SEGMENTS, MASK, heads=4)


def test_dpo_is_log_two_at_the_reference_and_its_formula_elsewhere():
    scores = normal(4, 5) * 10
    loss, margin = dpo_loss(scores[0], scores[1], scores[0], scores[1], beta=0.3)
    np.testing.assert_allclose(loss, np.log(2.0), rtol=1e-6)
    np.testing.assert_array_equal(margin, 0.0)
    loss, margin = dpo_loss(*scores, beta=0.3)
    expected = 0.3 * np.asarray((scores[0] - scores[2]) - (scores[1] - scores[3]), np.float64)
    np.testing.assert_allclose(margin, expected, rtol=1e-5, atol=1e-5)  # differences of numbers near 10
    np.testing.assert_allclose(loss, np.log1p(np.exp(-expected)), rtol=1e-5, atol=1e-5)
    assert np.all(np.isfinite(jax.grad(lambda x: dpo_loss(x, -x, x, x, beta=1.0)[0].sum())(scores[0] * 1e4)))


def test_log_probabilities_are_those_of_the_dense_softmax():
    targets, _ = next_tokens(TOKENS, SEGMENTS, MASK)
    found = log_probabilities(STUDENT, unembed, targets, chunk=4)
    expected = np.take_along_axis(
        log_softmax(wide(STUDENT) @ wide(MATRIX), axis=-1), np.asarray(targets)[..., None], axis=-1
    )
    np.testing.assert_allclose(found, expected[..., 0], **CLOSE)


def test_chunks_cover_every_position_once():
    numbers = jnp.arange(3 * 10, dtype=jnp.float32).reshape(3, 10)
    for chunk in (1, 9, 100):
        np.testing.assert_array_equal(by_chunks(lambda x: 2 * x, (numbers,), chunk), 2 * numbers)
