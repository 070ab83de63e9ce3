"""The plain pass of training: rows of packed documents through all layers, nothing cached, on a mesh.

It computes what `kvx.loop.forward` computes. Equal layers are one body that is scanned over their stacked weights, so
that compile time does not grow with depth; a layer keeps no activations but its input if asked to; and on a mesh each
layer's weights are gathered as it begins and let go as it ends.
"""

import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvx.decoder import Block, Decoder
from kvx.mesh import Placement, place_parameters
from kvx.pytree import pytree
from kvx.train.attention import causal_attention
from kvx.train.mesh import GATHERED
from kvx.train.stage import Remat

KEPT = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": None}
"""What of a layer outlives its forward pass. Products with weights have no batch dimensions, attention's have."""


@pytree
class Heads:
    """What one layer's heads compare, rotated, and read: every query head has keys and values of its group."""

    queries: Float[Array, "B T H D"]
    keys: Float[Array, "B T G D"]
    values: Float[Array, "B T G V"]


@pytree
class Pass:
    """What a pass leaves.

    Attributes:
        last: output of the last layer; `model.unembed` makes logits of it.
        hidden: output of every layer, if asked for.
        heads: of the last layer, if asked for.
    """

    last: Float[Array, "B T E"]
    hidden: Float[Array, "L B T E"] | None = None
    heads: Heads | None = None


def run(
    model: Decoder,
    tokens: Int[Array, "B T"],
    segments: Int[Array, "B T"] | None = None,
    positions: Int[Array, "B T"] | None = None,
    *,
    placement: Placement | None = None,
    remat: Remat = "none",
    hidden: bool = False,
    heads: bool = False,
) -> Pass:
    """All layers over rows of text.

    Args:
        segments: the document of each token; None: a row is one document.
        positions: within the documents; None: within the row.
        placement: of the mesh that the model lies on.
        remat: which of a layer's activations are recomputed in the backward pass.
        hidden, heads: what to keep beside the result.
    """
    gather = None if placement is None else Placement(placement.mesh, GATHERED)
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    layer = partial(_layer, segments=segments, positions=positions, placement=gather)
    blocks = list(model.blocks)
    above = blocks[-1:] if heads else []
    x, kept = _placed(model.embed(tokens), gather), []
    for alike in _runs(blocks[: len(blocks) - len(above)]):

        def body(x: Array, block: Block) -> tuple[Array, Any]:
            x, _ = layer(block, x)
            return x, x if hidden else None

        if remat != "none":
            body = jax.checkpoint(body, prevent_cse=len(alike) == 1, policy=KEPT[remat])
        if len(alike) == 1:
            x, out = body(x, alike[0])
            kept.append(None if out is None else out[None])
        else:
            x, out = jax.lax.scan(body, x, _stacked(alike))
            kept.append(out)
    found = None
    for block in above:
        x, found = layer(block, x)
        kept.append(x[None])
    return Pass(x, jnp.concatenate(kept) if hidden else None, found)


def _layer(
    block: Block,
    x: Float[Array, "B T E"],
    *,
    segments: Int[Array, "B T"] | None,
    positions: Int[Array, "B T"],
    placement: Placement | None,
) -> tuple[Float[Array, "B T E"], Heads]:
    form: Any = place_parameters(placement, block)
    form = form.expanded
    queries, keys, values = form.project(x)
    spots = positions[:, :, None]
    queries, keys = form.rotary(queries, spots), form.rotary(keys, spots)
    out = causal_attention(queries, keys, values, segments, form.spec, placement)
    return _placed(form.finish(x, out), placement), Heads(form.own(queries), form.own(keys), values)


def _placed(x: Float[Array, "B T E"], placement: Placement | None) -> Float[Array, "B T E"]:
    return x if placement is None else placement.put(x, ("rows", "sequence", None))


def _runs(blocks: Sequence[Block]) -> Iterator[list[Block]]:
    """Neighbours that one compiled body serves: of equal structure, static facts and shapes."""

    def kind(block: Block) -> Any:
        leaves, structure = jax.tree.flatten(block)
        return structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)

    for _, alike in itertools.groupby(blocks, key=kind):
        yield list(alike)


def _stacked(blocks: list[Block]) -> Any:
    """One block whose arrays have a leading axis of layers: material for a scan, no block itself."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
