"""What conversions learn from text: second moments of each layer's inputs, and how far back its heads look."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int
from rich.console import Console

from kvx.errors import BadInput
from kvx.inputs import checked_prompt
from kvx.kernels.decode_attention import slot_logits
from kvx.kernels.logits import softmax_rows
from kvx.loop import attend, project
from kvx.models.block import DecoderBlock
from kvx.models.build import Model
from kvx.policies import full
from kvx.prefill import embed
from kvx.progress import Steps

Tree = TypeVar("Tree")


def about_mean(moments: Float[np.ndarray, "X X"]) -> Float[np.ndarray, "X X"]:
    """Second moments about the mean, which is the column of the channel of ones: that channel has none."""
    return moments - np.outer(moments[:, -1], moments[:, -1])


@dataclass(frozen=True)
class Moments:
    """Means over the tokens of some texts, of one layer.

    Queries, keys and values are linear in the inputs, so the inputs' second moments are theirs as well.

    Attributes:
        inputs: mean of x x^T over the normed inputs with a last channel of ones: the last column is the mean of x.
        attended: the same, each token counted by the attention that it gets, mean over heads.
        query_norms: mean 2-norm of each rotary pair of each query head.
        key_norms: of each KV head.
        distances: how much of each query head's attention falls on the token d places back; rows sum to 1.
    """

    inputs: Float[np.ndarray, "X X"]
    attended: Float[np.ndarray, "X X"]
    query_norms: Float[np.ndarray, "H P"]
    key_norms: Float[np.ndarray, "G P"]
    distances: Float[np.ndarray, "H T"]


def measure_moments(
    model: Model,
    batches: Iterable[ArrayLike],
    *,
    device: jax.Device | None = None,  # type: ignore[valid-type] # jaxlib has no stubs
    console: Console | None = None,
) -> tuple[Moments, ...]:
    """Moments of every layer's attention over some texts: layer after layer, each over all batches.

    A batch's sums are float32, their total float64. Memory: beside the model, the residual stream of all batches, two
    float64 matrices of the model's width for each layer, and T x T for each head of one row.

    Args:
        model: of `kvx.models`; its layers are of ordinary attention.
        batches: (B, T) token ids each, all rows of full length.
        device: what computes: each layer's weights are there while it is at work, for models that no device holds.
            None: where the model is.
        console: for the progress bar; None: standard error.

    Raises:
        BadInput: no batches, batches of several lengths, or token ids that the model does not have.
    """
    texts = [checked_prompt(model, batch, None, (full(),), 0)[0] for batch in batches]
    if not texts:
        raise BadInput("batches is empty; allowed: at least one batch of token ids (B, T)")
    if len({text.shape[1] for text in texts}) > 1:
        raise BadInput(f"batches have rows of {sorted({text.shape[1] for text in texts})} tokens; allowed: one length")
    count = sum(text.size for text in texts)
    streams = [_at(device, embed(model, text)) for text in texts]
    places = [_at(device, jnp.broadcast_to(jnp.arange(text.shape[1], dtype=jnp.int32), text.shape)) for text in texts]
    found = []
    with Steps(len(texts) * len(model.blocks), console) as steps:
        for layer, block in enumerate(model.blocks):
            here, totals = _at(device, block), [np.zeros(())] * len(fields(Moments))
            for number, positions in enumerate(places):
                steps(f"layer {layer + 1}/{len(model.blocks)}: batch {number + 1}/{len(texts)}")
                new = _sums(here, streams[number], positions)
                totals = [old + np.asarray(each, np.float64) for old, each in zip(totals, new, strict=True)]
                streams[number] = attend(here, streams[number], positions)[0]
            found.append(Moments(*(total / count for total in totals)))
    return tuple(found)


def _at(device: jax.Device | None, tree: Tree) -> Tree:  # type: ignore[valid-type] # jaxlib has no stubs
    return tree if device is None else jax.device_put(tree, device)


@jax.jit
def _sums(
    block: DecoderBlock, x: Float[Array, "B T E"], positions: Int[Array, "B T"]
) -> tuple[Float[Array, "X X"], Float[Array, "X X"], Float[Array, "H P"], Float[Array, "G P"], Float[Array, "H T"]]:
    """Sums over a batch's tokens, in the order of `Moments`; row by row for the T x T maps."""
    query, tokens = project(block, x, positions)
    queries = query.raw.reshape(len(x), -1, *query.raw.shape[-2:])  # (B, H, T, D)

    def look(row: tuple) -> tuple[Float[Array, "T"], Float[Array, "H T"]]:
        one = jax.tree.map(lambda array: array[None], row)
        logits = slot_logits(*one, **query.masking)
        probabilities = softmax_rows(logits)[0].reshape(queries.shape[1], x.shape[1], x.shape[1])
        return jnp.mean(jnp.sum(probabilities, axis=1), axis=0), by_distance(probabilities)

    received, distances = jax.lax.map(look, (query.rotated, tokens.rotated_keys, positions, tokens.positions))
    inputs = block.attention_norm(x).astype(jnp.float32)
    inputs = jnp.concatenate([inputs, jnp.ones_like(inputs[..., :1])], axis=-1)
    every, attended = _second_moments(inputs, jnp.ones_like(received)), _second_moments(inputs, received)
    return every, attended, _pair_norms(queries), _pair_norms(tokens.raw_keys), jnp.sum(distances, axis=0)


def _second_moments(x: Float[Array, "B T X"], weights: Float[Array, "B T"]) -> Float[Array, "X X"]:
    # Small eigenvalues matter to whoever takes a root: no TF32, no bfloat16 passes.
    return jnp.einsum("btx,bty->xy", x * weights[..., None], x, precision=jax.lax.Precision.HIGHEST)


def by_distance(probabilities: Float[Array, "H T T"]) -> Float[Array, "H T"]:
    """Sums of a causal map's diagonals: entry d is what falls on the token d places back."""
    heads, length = probabilities.shape[:2]
    wide = jnp.pad(probabilities[:, :, ::-1], ((0, 0), (0, 0), (0, length)))
    # Rows laid end to end and cut one number shorter: each starts one column further than the one before.
    skewed = wide.reshape(heads, -1)[:, :-length].reshape(heads, length, 2 * length - 1)
    return jnp.sum(skewed, axis=1)[:, length - 1 :]


def _pair_norms(x: Float[Array, "B N T D"]) -> Float[Array, "N P"]:
    half = x.shape[-1] // 2
    wide = x.astype(jnp.float32)
    return jnp.sum(jnp.sqrt(wide[..., :half] ** 2 + wide[..., half:] ** 2), axis=(0, 2))
