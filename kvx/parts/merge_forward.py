"""Merging forward: a leaving token's value may be spread over the kept ones after it (grid 1, third column)."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from kvx.context import Context
from kvx.evidence import Evidence, Requests
from kvx.parts.chance import uniforms
from kvx.parts.losers import Losers
from kvx.parts.ranking import ranks
from kvx.pytree import pytree, static
from kvx.stores.slots import weakest_several
from kvx.tokens import Tokens

FLOW = "flow"
"""Statistic: probability that a token received while decoding, mean over the query heads, summed over the steps."""


@pytree
class MergeForward(Losers):
    """A leaving token's value goes, by chance, to the kept ones right after it in the text (CaM, Zhang et al. 2024).

        rho_i = clip(A_i / mean_{j in J_i} A_j, 0, 1),    v_j += b_i v_i / |J_i| for j in J_i,    b_i ~ Bernoulli(rho_i)

    J_i the next `width` kept tokens, fewer at the end of the text, and |J_i| their number, so that nothing is lost
    where they are fewer (the paper's code divides by the width). 0 / 0 counts as 0, x / 0 as 1. Keys stay as they are,
    and A_j does not inherit A_i. Tokens that leave together each merge by what was there before. A counts from the end
    of the prompt on, where nothing merges, as in kvpress.

    Sums are float32 and rounded once a decision to the dtype of the cache. A value is spread just before the next token
    comes, while the slot it left still holds it; the state is which slots those are.

    Attributes:
        width: kept tokens that share a value.
        most: tokens that leave together.
        seed: of the coins, one for each (layer, KV head, true position).
    """

    width: int = static(32)
    most: int = static(1)
    seed: int = static(0)
    unchained: ClassVar[bool] = True
    values_apart: ClassVar[bool] = True

    def observe(self, prefill: bool) -> Requests:
        return Requests() if prefill else Requests(rows=1)

    def stats(self, tokens: Tokens, evidence: Evidence | None, context: Context) -> dict[str, Shaped[Array, "B G T"]]:
        return {FLOW: jnp.zeros(tokens.positions.shape, jnp.float32)}

    def update(self, stats: dict[str, Shaped[Array, "B G C"]], evidence: Evidence) -> dict[str, Shaped[Array, "B G C"]]:
        return {FLOW: stats[FLOW] + jnp.mean(evidence.last_rows(1)[..., 0, :], axis=2)}

    def settle(
        self,
        tokens: Tokens,
        kept: Bool[Array, "B G T"],
        lost: Bool[Array, "B G T"],
        evidence: Evidence,
        context: Context,
    ) -> tuple[Tokens, Any]:
        nowhere = jnp.zeros((*kept.shape[:2], self.most), jnp.int32)
        return tokens, (nowhere, nowhere - 1)

    def step(
        self,
        store: Any,
        state: Any,
        scores: Float[Array, "B G C"],
        excess: Int[Array, "B G"],
        most: int,
        context: Context,
    ) -> tuple[Any, Any]:
        assert most <= self.most, "the state has a place for each that leaves"
        positions = store.positions()
        leaving = weakest_several(scores, positions, excess, most)
        going, slots = jax.lax.top_k(leaving.astype(jnp.int32), self.most)
        left = jnp.where(going > 0, jnp.take_along_axis(positions, slots, axis=-1), -1)
        return store.release(scores, excess, most), (slots, left)

    def before(self, store: Any, state: Any, context: Context) -> tuple[Any, Any]:
        slots, left = state
        tokens = store.tokens()

        def merged():
            return self._merged(tokens, slots, left, context)

        # Where several leave at once, nobody does at most steps.
        some = merged() if self.most == 1 else jax.lax.cond(jnp.any(left >= 0), merged, lambda: self._nothing(tokens))
        return store.write_values(*some), (slots, jnp.full_like(left, -1))

    def _merged(
        self, tokens: Tokens, slots: Int[Array, "B G N"], left: Int[Array, "B G N"], context: Context
    ) -> tuple[Int[Array, "B G M"], Float[Array, "B G M V"]]:
        """Slots that take something over, ascending, and their new values; those from C on stand for none.

        Args:
            slots, left: what tokens left, and their positions, -1 for none.
        """
        kept, capacity = tokens.present, tokens.positions.shape[-1]
        # A window is a run of places among the kept tokens, in the order of the text.
        place = ranks(kept.astype(jnp.float32), tokens.positions)[..., None]
        start = jnp.sum(kept[..., None] & (tokens.positions[..., None] < left[:, :, None]), axis=2)
        inside = kept[..., None] & (place >= start[:, :, None]) & (place < start[:, :, None] + self.width)
        size = jnp.sum(inside, axis=2)

        flow = tokens.stats[FLOW]
        mean = jnp.sum(jnp.where(inside, flow[..., None], 0.0), axis=2) / jnp.maximum(size, 1)
        probability = merge_probability(jnp.take_along_axis(flow, slots, axis=-1), mean)
        drawn = uniforms(self.seed, context.layer, jnp.maximum(left, 0)) < probability
        merges = (left >= 0) & (size > 0) & drawn

        # Windows overlap where several leave: a slot takes the sum of what comes, and is written once.
        share = jnp.where(inside & merges[:, :, None], 1 / jnp.maximum(size, 1)[:, :, None], 0.0)
        targets = self._targets(jnp.any(share > 0, axis=-1))
        rows = jnp.minimum(targets, capacity - 1)[..., None]
        taken = jnp.einsum(
            "bgmn,bgnv->bgmv",
            jnp.take_along_axis(share, rows, axis=2),
            jnp.take_along_axis(tokens.values, slots[..., None], axis=2).astype(jnp.float32),
            precision="highest",
        )
        return targets, jnp.take_along_axis(tokens.values, rows, axis=2).astype(jnp.float32) + taken

    def _targets(self, touched: Bool[Array, "B G C"]) -> Int[Array, "B G M"]:
        """The touched slots, ascending; past the last where there are fewer than the most there can be."""
        index = jnp.arange(touched.shape[-1], dtype=jnp.int32)
        keys = jnp.where(touched, index, index + index.size)
        return -jax.lax.top_k(-keys, min(self.most * self.width, index.size))[0]

    def _nothing(self, tokens: Tokens) -> tuple[Int[Array, "B G M"], Float[Array, "B G M V"]]:
        """What `_merged` answers where nobody has left."""
        targets = self._targets(jnp.zeros(tokens.positions.shape, bool))
        return targets, jnp.zeros((*targets.shape, tokens.values.shape[-1]), jnp.float32)


def merge_probability(own: Float[Array, "*shape"], mean: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """clip(own / mean, 0, 1); 0 / 0 is 0 and x / 0 is 1."""
    whole = jnp.where(own > 0, 1.0, 0.0)
    return jnp.where(mean > 0, jnp.clip(own / jnp.where(mean > 0, mean, 1.0), 0.0, 1.0), whole)
