"""What one layer computes on a few texts, and what a policy would hold of it at every row: material to train beside."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvx.context import Context, Spec
from kvx.decoder import Block
from kvx.kernels.decode_attention import slot_logits, ungroup
from kvx.kernels.logits import partial_softmax
from kvx.kernels.merge_partials import Partial
from kvx.loop import attend, project
from kvx.policy import Policy
from kvx.pytree import pytree
from kvx.query import Query
from kvx.step import decode_layer
from kvx.tokens import Tokens


@pytree
class LayerRecord:
    """One layer on B texts of T tokens, seen from their last N rows; every text is of full length.

    Attributes:
        queries: of the rows, rotated.
        keys, values: of all tokens, keys rotated.
        lost: tokens before a row that the policy no longer holds there.
        sparse: attention of the rows over what it holds.
        full: attention of the rows over everything before them.
    """

    queries: Float[Array, "B G R N D"]
    keys: Float[Array, "B G T D"]
    values: Float[Array, "B G T V"]
    lost: Bool[Array, "B G N T"]
    sparse: Partial
    full: Float[Array, "B G R N V"]

    def sample(self, texts: Int[Array, "S"], rows: Int[Array, "K"]) -> "LayerRecord":
        """Some rows of some texts, the same rows of each."""
        sparse = Partial(self.sparse.out[texts][:, :, :, rows], self.sparse.lse[texts][:, :, :, rows])
        return LayerRecord(
            self.queries[texts][:, :, :, rows],
            self.keys[texts],
            self.values[texts],
            self.lost[texts][:, :, rows],
            sparse,
            self.full[texts][:, :, :, rows],
        )


@partial(jax.jit, static_argnames=("layers", "prompt"))
def record_layer(
    policy: Policy, block: Block, x: Float[Array, "B T E"], layer: Int[Array, ""], *, layers: int, prompt: int
) -> LayerRecord:
    """Run a policy of one layer over texts: a prompt at once, then row by row, as generation would.

    The layer's input is that of full attention, whatever the policy drops. Memory: N x T numbers per text and query
    head while it runs.

    Args:
        policy: what evicts; one that decides by layer, and whose store shows what it holds (`positions`).
        x: the layer's input.
        layers: of the model.
        prompt: tokens of each text that come at once; the others are the N rows.
    """
    positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
    query, tokens = project(block, x, positions)
    held = _held(policy, block, x[:, :prompt], query, tokens, layer, layers)
    keys, later = tokens.rotated_keys, _rows(query, prompt, x.shape[1] - prompt)
    logits = slot_logits(later.rotated, keys, later.positions, tokens.positions, **query.masking)
    by_row = jnp.tile(held, (1, 1, block.spec.group, 1))  # query heads and rows share an axis
    full = ungroup(partial_softmax(logits, tokens.values), block.spec.group)
    sparse = ungroup(partial_softmax(jnp.where(by_row, logits, -jnp.inf), tokens.values), block.spec.group)
    lost = (tokens.positions[:, :, None] <= later.positions[:, None, :, None]) & ~held
    return LayerRecord(later.rotated, keys, tokens.values, lost, sparse, full.out)


def _held(
    policy: Policy,
    block: Block,
    x: Float[Array, "B P E"],
    query: Query,
    tokens: Tokens,
    layer: Int[Array, ""],
    layers: int,
) -> Bool[Array, "B G N T"]:
    """What each row after the prompt reads, itself included."""
    batch, prompt = x.shape[:2]
    length = query.positions.shape[1]
    spec = Spec(block.spec, layers, length, prompt, length - prompt)
    context = Context(layer, jnp.full(batch, prompt, jnp.int32), spec)
    requests = policy.observe(prefill=True)
    _, past, evidence = attend(
        block, x, query.positions[:, :prompt], requests=requests, rotated=policy.rotated, lengths=context.lengths
    )
    start = policy.prefill(past, evidence, context, policy.slots(spec, 0))

    def advance(cache, place):
        # As in a decode step: the new token is appended, read with the others, and then something leaves.
        here = replace(context, lengths=jnp.full(batch, place, jnp.int32))
        index = jnp.full((*tokens.positions.shape[:2], 1), place, jnp.int32)
        fresh = policy.stats(tokens.take(index, jnp.ones(index.shape, bool)), None, here)
        held = jnp.concatenate([cache.store.positions(), index], axis=2)
        _, cache, _, _ = decode_layer(policy, cache, _rows(query, place, 1), fresh, None, here.lengths + 1, here)
        return cache, held

    _, held = jax.lax.scan(advance, start, jnp.arange(prompt, length, dtype=jnp.int32))
    held = jnp.moveaxis(held, 0, 2)
    axes = jnp.ogrid[: held.shape[0], : held.shape[1], : held.shape[2]]
    mask = jnp.zeros((*held.shape[:3], length), bool)
    # An empty slot's -1 counts as beyond the end, where nothing is written.
    return mask.at[*(axis[..., None] for axis in axes), jnp.where(held < 0, length, held)].set(True, mode="drop")


def _rows(query: Query, start: int | Int[Array, ""], count: int) -> Query:
    return replace(
        query,
        raw=jax.lax.dynamic_slice_in_dim(query.raw, start, count, axis=3),
        positions=jax.lax.dynamic_slice_in_dim(query.positions, start, count, axis=1),
    )
