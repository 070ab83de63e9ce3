"""Chunked prefill: what each layer holds between chunks, and the evidence that accumulates over them."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvx.buckets import bucket
from kvx.context import Context, Spec
from kvx.decoder import Block
from kvx.evidence import Evidence, Requests
from kvx.loop import attend
from kvx.policy import Policy
from kvx.tokens import Tokens, concatenate


class ChunkedPrompt:
    """The layers of a prompt that arrives in chunks.

    Each layer holds the tokens so far (all of them, or what a cut left) and the evidence about them.
    """

    def __init__(self, lengths: Int[Array, "B"], chunk: int):
        self.lengths, self.chunk = lengths, chunk
        self.held: dict[int, tuple[Tokens, Evidence]] = {}

    def extend(
        self,
        layer: int,
        block: Block,
        x: Float[Array, "B T E"],
        start: int,
        requests: Requests,
        rotated: bool,
        renumber: bool,
        marks: Mapping[str, Int[Array, "B whole"]],
    ) -> Float[Array, "B T E"]:
        """One layer over the chunk that starts at `start`; returns the layer's output.

        Args:
            marks: of the whole prompt, padded to whole chunks.
        """
        index = start + jnp.arange(self.chunk, dtype=jnp.int32)
        positions = jnp.where(index < self.lengths[:, None], index, -1)
        form = {"requests": requests, "rotated": rotated, "renumber": renumber, "lengths": self.lengths}
        form["marks"] = {name: mark[:, start : start + self.chunk] for name, mark in marks.items()}
        if layer not in self.held:
            x, tokens, evidence = attend(block, x, positions, **form)
            self.held[layer] = (tokens, evidence)
            return x
        past, before = self.held[layer]
        # Padded to a bucket, so that the growing past of a long prompt needs few compiled programs.
        padded = past.pad(bucket(past.positions.shape[-1]))
        x, new, evidence = attend(block, x, positions, padded, **form)
        self.held[layer] = _join(past, before, new, evidence)
        return x

    def finished(self, layer: int) -> tuple[Tokens, Evidence]:
        """The layer's tokens and evidence, ready to be packed; the layer lets go of them."""
        return self.held.pop(layer)

    def cut(self, layer: int, policy: Policy, capacity: int, spec: Spec) -> None:
        """Keep of a layer what the policy selects by the last chunk's evidence."""
        tokens, evidence = self.held[layer]
        if tokens.positions.shape[-1] > capacity:
            context = Context(jnp.int32(layer), self.lengths, spec)
            self.held[layer] = _cut(policy, tokens, evidence, context, capacity)


@jax.jit
def _join(past: Tokens, before: Evidence, new: Tokens, evidence: Evidence) -> tuple[Tokens, Evidence]:
    """Tokens and evidence of all chunks so far; `evidence` is about the padded past and the chunk."""
    held, width = past.positions.shape[-1], new.positions.shape[-1]

    def unpad(array):
        return jnp.concatenate([array[..., :held], array[..., -width:]], axis=-1)

    def widen(array):
        return jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, width)])

    columns = {
        column: column.combine(widen(before.columns[column]), unpad(found))
        for column, found in evidence.columns.items()
    }
    rows = None
    if evidence.rows is not None and before.rows is not None:
        rows = _newest_rows(widen(before.rows), unpad(evidence.rows), jnp.sum(new.positions[:, 0] >= 0, axis=-1))
    peak = None
    if evidence.query_peak is not None and before.query_peak is not None:
        peak = jnp.maximum(before.query_peak, evidence.query_peak)
    queries = None
    if evidence.queries is not None and before.queries is not None:
        queries = jnp.concatenate([before.queries, evidence.queries], axis=3)
    evidence = replace(evidence, columns=columns, rows=rows, query_peak=peak, queries=queries)
    return concatenate(past, new), evidence


def _newest_rows(
    earlier: Float[Array, "B G R W S"], rows: Float[Array, "B G R W S"], own: Int[Array, "B"]
) -> Float[Array, "B G R W S"]:
    """The last W queries over both: the chunk's `own` ones, preceded by the newest earlier ones if W needs more.

    Earlier queries cannot see later keys, so their rows are complete with zeros there.
    """
    count = rows.shape[-2]
    place = jnp.arange(count)
    shifted = place + own[:, None]
    picked = jnp.where(shifted < count, shifted, count + place)
    both = jnp.concatenate([earlier, rows], axis=-2)
    return jnp.take_along_axis(both, picked[:, None, None, :, None], axis=-2)


@partial(jax.jit, static_argnames=("capacity",))
def _cut(
    policy: Policy, tokens: Tokens, evidence: Evidence, context: Context, capacity: int
) -> tuple[Tokens, Evidence]:
    """The tokens a policy keeps, gathered to the front; what the evidence said of them lives on in their statistics."""
    tokens, mask, _ = policy.select(tokens, evidence, context)

    def spent(array):
        return jnp.zeros((*array.shape[:-1], capacity), array.dtype)

    columns = {column: spent(found) for column, found in evidence.columns.items()}
    rows = None if evidence.rows is None else spent(evidence.rows)
    queries = None if evidence.queries is None else evidence.queries[:, :, :, :0]
    return tokens.select(mask, capacity), replace(evidence, columns=columns, rows=rows, queries=queries)
