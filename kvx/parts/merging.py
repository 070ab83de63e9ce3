"""Merging: losers that resemble a survivor are taken up by it, the others are gone (grid 1, third column)."""

from dataclasses import replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvx.context import Context
from kvx.evidence import Evidence
from kvx.parts.losers import Losers
from kvx.pytree import pytree, static
from kvx.stores.slots import weakest
from kvx.tokens import Tokens

BLOCK = 128
"""Losers compared with all survivors at a time, so that no S x S array exists."""


@pytree
class MergeNearest(Losers):
    """Into the survivor of highest key cosine u, if u reaches a moving threshold (D2O, Wan et al. 2024, section 3.3).

        tau <- mean u the first time, then alpha tau + (1 - alpha) mean u; the update comes before the test
        "exp":  x_c <- (e x_c + sum_R exp(u_r) x_r) / (e + sum_R exp(u_r))    (the paper)
        "mean": x_c <- (x_c + sum_R u_r x_r) / (1 + |R|)                      (its code; shrinks norms)

    for keys and values alike, R the recalled losers of survivor c. tau is one number per row of the batch and layer.
    Keys merge after rotation, at different positions, as in the paper.
    """

    alpha: float = static(0.5)
    weights: str = static("exp")
    values_apart: ClassVar[bool] = True

    def settle(
        self,
        tokens: Tokens,
        kept: Bool[Array, "B G T"],
        lost: Bool[Array, "B G T"],
        evidence: Evidence,
        context: Context,
    ) -> tuple[Tokens, Any]:
        keys = tokens.rotated_keys.astype(jnp.float32)
        nearest, cosine = nearest_survivor(keys, keys, kept)
        lost = lost & jnp.any(kept, axis=-1, keepdims=True)
        threshold, started = self._threshold(jnp.zeros(kept.shape[0]), jnp.zeros(kept.shape[0], bool), cosine, lost)
        recalled = lost & (cosine >= threshold[:, None, None])
        weight = jnp.where(recalled, self._weight(cosine), 0.0)
        batch, heads = jnp.ogrid[: kept.shape[0], : kept.shape[1]]
        where = (batch[..., None], heads[..., None], nearest)
        taken = jnp.zeros(kept.shape, jnp.float32).at[where].add(weight if self.weights == "exp" else recalled * 1.0)
        own = jnp.e if self.weights == "exp" else 1.0

        def merge(rows):
            wide = rows.astype(jnp.float32)
            mixed = (own * wide).at[where].add(weight[..., None] * wide) / (own + taken)[..., None]
            # Entries that recall nobody stay bit-identical.
            return jnp.where((taken > 0)[..., None], mixed, wide).astype(rows.dtype)

        merged = replace(tokens.with_form(rotated=True), values=merge(tokens.values))
        return replace(merged, keys=merge(merged.keys)), (threshold, started)

    def step(
        self,
        store: Any,
        state: Any,
        scores: Float[Array, "B G C"],
        excess: Int[Array, "B G"],
        most: int,
        context: Context,
    ) -> tuple[Any, Any]:
        assert most == 1, "losers that find their survivor one by one"
        threshold, started = state
        tokens = store.tokens()
        loser, leaving = weakest(scores, tokens.positions), excess > 0
        victim = tokens.take(loser[..., None], leaving[..., None])
        others = tokens.present & (jnp.arange(scores.shape[-1]) != loser[..., None])
        nearest, cosine = nearest_survivor(
            victim.rotated_keys.astype(jnp.float32), tokens.rotated_keys.astype(jnp.float32), others
        )
        # A head that holds nothing else has nobody to compare with: its cosine of -inf must not reach the average.
        judged = leaving & jnp.any(others, axis=-1)
        threshold, started = self._threshold(threshold, started, cosine, judged[..., None])
        recalled = judged & (cosine[..., 0] >= threshold[:, None])
        survivor = tokens.take(nearest, recalled[..., None])
        weight = self._weight(cosine)[..., None]
        own, total = (jnp.e, jnp.e + weight) if self.weights == "exp" else (1.0, 2.0)
        mixed = replace(
            survivor.with_form(rotated=True),
            keys=(own * survivor.rotated_keys + weight * victim.rotated_keys) / total,
            values=(own * survivor.values + weight * victim.values) / total,
        )
        store = store.write(nearest[..., 0], mixed, recalled)
        return store.evict(loser, leaving), (threshold, started)

    def _weight(self, cosine: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        return jnp.exp(cosine) if self.weights == "exp" else cosine

    def _threshold(self, threshold, started, cosine, lost):
        """The moving average after these losers; rows that lose nothing keep theirs."""
        count = jnp.sum(lost, axis=(1, 2))
        mean = jnp.sum(jnp.where(lost, cosine, 0.0), axis=(1, 2)) / jnp.maximum(count, 1)
        moved = jnp.where(started, self.alpha * threshold + (1 - self.alpha) * mean, mean)
        return jnp.where(count > 0, moved, threshold), started | (count > 0)


def nearest_survivor(
    keys: Float[Array, "B G E D"], survivors: Float[Array, "B G T D"], kept: Bool[Array, "B G T"]
) -> tuple[Int[Array, "B G E"], Float[Array, "B G E"]]:
    """For each key the kept one of highest cosine, and that cosine; in a tie the lower index."""

    def unit(rows):
        return rows / jnp.maximum(jnp.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)

    survivors = unit(survivors)
    length = keys.shape[2]
    block = min(BLOCK, length)
    padded = jnp.pad(unit(keys), ((0, 0), (0, 0), (0, -length % block), (0, 0)))
    blocks = jnp.moveaxis(padded.reshape(*padded.shape[:2], -1, block, padded.shape[-1]), 2, 0)

    def compare(rows):
        cosine = jnp.einsum("bged,bgtd->bget", rows, survivors)
        cosine = jnp.where(kept[:, :, None], cosine, -jnp.inf)
        return jnp.argmax(cosine, axis=-1).astype(jnp.int32), jnp.max(cosine, axis=-1)

    index, cosine = jax.lax.map(compare, blocks)

    def joined(array):
        return jnp.moveaxis(array, 0, 2).reshape(*array.shape[1:3], -1)[..., :length]

    return joined(index), joined(cosine)
