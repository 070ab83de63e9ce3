"""Losses of distillation on packed rows, as pure functions: cross-entropy, divergences of logits, hidden states.

All are means over the tokens that count, and zero where none does. A position t counts if the next token belongs to
the same document and is to be learned (`next_tokens`): the same positions for every loss, so that their counts agree
and the parts of a batch can be added. Logits are never there all at once: a scan over chunks of positions makes them,
in float32, and makes them again for the gradient.

Relations between tokens are in `kvx.train.relations`, preferences in `kvx.train.preferences`.
"""

from collections.abc import Callable, Collection
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Unembed = Callable[[Float[Array, "B T E"]], Float[Array, "B T N"]]
"""A model's last norm and output matrix: hidden states to float32 logits."""

DIVERGENCES = ("kl", "reverse_kl", "js")
LOGIT_LOSSES = ("ce", *DIVERGENCES)


def next_tokens(
    tokens: Int[Array, "B T"], segments: Int[Array, "B T"], mask: Bool[Array, "B T"]
) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
    """What each position predicts, and whether that counts.

    Args:
        segments: the document of each token.
        mask: tokens that are to be learned; False for padding.

    Returns:
        The next token of each position, and True where it is of the same document and under the mask.
    """
    last = jnp.zeros_like(mask[:, :1])
    same = segments[:, 1:] == segments[:, :-1]
    return jnp.roll(tokens, -1, axis=1), jnp.concatenate([same & mask[:, 1:], last], axis=1)


def mean_over(values: Float[Array, "B T"], counted: Bool[Array, "B T"]) -> Float[Array, ""]:
    """Mean of the counted values; 0 if there are none."""
    total = jnp.sum(jnp.where(counted, values, 0.0), dtype=jnp.float32)
    return total / jnp.maximum(jnp.sum(counted, dtype=jnp.float32), 1.0)


def cross_entropy(logits: Float[Array, "*S N"], targets: Int[Array, "*S"]) -> Float[Array, "*S"]:
    """-log softmax(z)[target], in nats."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def divergence(
    student: Float[Array, "*S N"], teacher: Float[Array, "*S N"], kind: str = "kl", temperature: float = 1.0
) -> Float[Array, "*S"]:
    """How far the student's distribution is from the teacher's, in nats.

    With p = softmax(teacher / tau), q = softmax(student / tau) and m = (p + q) / 2, times tau^2, so that gradients keep
    their size (Hinton et al. 2015):

        kl          sum p (log p - log q)     forward: covers what the teacher may say
        reverse_kl  sum q (log q - log p)     stays where the teacher is likely
        js          1/2 sum p (log p - log m) + 1/2 sum q (log q - log m), at most log 2 times tau^2

    Args:
        student, teacher: logits over the same vocabulary.
        kind: one of these names.
        temperature: tau, above 0.
    """
    p = jax.nn.log_softmax(teacher.astype(jnp.float32) / temperature, axis=-1)
    q = jax.nn.log_softmax(student.astype(jnp.float32) / temperature, axis=-1)
    if kind == "kl":
        found = _expected(p, p, q)
    elif kind == "reverse_kl":
        found = _expected(q, q, p)
    else:
        middle = jnp.logaddexp(p, q) - jnp.log(2.0)
        found = 0.5 * (_expected(p, p, middle) + _expected(q, q, middle))
    return temperature**2 * found


def logit_losses(
    student: Float[Array, "B T E"],
    unembed: Unembed,
    targets: Int[Array, "B T"],
    counted: Bool[Array, "B T"],
    names: Collection[str],
    teacher: Float[Array, "B T F"] | None = None,
    unembed_teacher: Unembed | None = None,
    *,
    temperature: float = 1.0,
    chunk: int = 1024,
) -> dict[str, Float[Array, ""]]:
    """Losses of logits from hidden states, `chunk` tokens at a time: the values and gradients of the dense forms.

    Args:
        student, teacher: outputs of the last layers. No gradient goes into the teacher, which "ce" does not need.
        unembed, unembed_teacher: what makes logits of them.
        targets, counted: by `next_tokens`.
        names: of `LOGIT_LOSSES`.
        temperature: of the divergences.
        chunk: tokens whose logits exist at a time, over all rows (and all devices that share them); at least one of
            each row.

    Returns:
        Each loss by its name: the mean over counted tokens.
    """

    def values(x: Float[Array, "B C E"], y: Float[Array, "B C F"] | None, goal: Int[Array, "B C"]) -> dict[str, Array]:
        logits = unembed(x)
        found = {"ce": cross_entropy(logits, goal)} if "ce" in names else {}
        kinds = [kind for kind in DIVERGENCES if kind in names]
        if kinds:
            assert y is not None and unembed_teacher is not None, "divergences are from a teacher"
            guide = jax.lax.stop_gradient(unembed_teacher(y))
            found |= {kind: divergence(logits, guide, kind, temperature) for kind in kinds}
        return found

    found = by_chunks(values, (student, teacher, targets), chunk)
    return {name: mean_over(found[name], counted) for name in found}


def log_probabilities(
    hidden: Float[Array, "B T E"], unembed: Unembed, targets: Int[Array, "B T"], *, chunk: int = 1024
) -> Float[Array, "B T"]:
    """log softmax(z_t)[target_t] at every position, `chunk` tokens at a time, in nats."""
    return -by_chunks(lambda x, goal: cross_entropy(unembed(x), goal), (hidden, targets), chunk)


def hidden_loss(
    student: Float[Array, "L B T E"], teacher: Float[Array, "M B T F"], counted: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """mean over layers, counted tokens and channels of (h_S - h_T)^2; no gradient goes into the teacher.

    Args:
        student, teacher: the residual stream after each of the same layers.

    Raises:
        ValueError: streams of different widths or numbers of layers, which have nothing to compare.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"hidden states of shape {student.shape} and {teacher.shape}; allowed: equal shapes")
    apart = student.astype(jnp.float32) - jax.lax.stop_gradient(teacher).astype(jnp.float32)
    return mean_over(jnp.mean(apart**2, axis=(0, 3)), counted)


def by_chunks(function: Callable, arrays: tuple, chunk: int):
    """A function of every position, over a few positions at a time, whose inner values are not kept for the gradient.

    Args:
        function: of slices (B, C, ...) of the arrays; gives arrays (B, C), or a tree of them.
        arrays: (B, T, ...), or None.
        chunk: tokens at a time, over all rows; rounded up to whole positions.
    """
    batch, length = jax.tree.leaves(arrays)[0].shape[:2]
    width = min(length, max(1, chunk // batch))
    count = -(-length // width)

    def cut(array: Array) -> Array:
        padded = jnp.pad(array, [(0, 0), (0, count * width - length)] + [(0, 0)] * (array.ndim - 2))
        return jnp.moveaxis(padded.reshape(batch, count, width, *array.shape[2:]), 1, 0)

    @partial(jax.checkpoint, prevent_cse=False)
    def body(parts):
        return function(*parts)

    found = jax.lax.map(body, jax.tree.map(cut, arrays))
    return jax.tree.map(lambda array: jnp.moveaxis(array, 0, 1).reshape(batch, -1)[:, :length], found)


def _expected(log_weights: Array, first: Array, second: Array) -> Array:
    """sum of exp(log_weights) (first - second); where a weight is 0 the difference does not matter, even infinite."""
    weights = jnp.exp(log_weights)
    return jnp.sum(jnp.where(weights > 0, weights * (first - second), 0.0), axis=-1)
