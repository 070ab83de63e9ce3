"""The stage that frees a slot before attention: the key whose hash is farthest from the fresh query's makes room."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt32

from kvx.context import Context, Spec
from kvx.evidence import Evidence, Requests
from kvx.parts.amounts import Amount
from kvx.parts.simhash import WORD, hamming, hyperplanes, simhash
from kvx.pytree import pytree, static
from kvx.query import Query
from kvx.stage import Stage
from kvx.tokens import Tokens


@pytree
class Overwrite(Stage):
    """The fresh token takes the slot of the one whose key hash differs most from the query's, summed over its heads.

    The choice comes before the token is appended, so a head never holds more than its budget and attention never sees
    who left. First tokens and the newest are protected. Few bits tie often; then the oldest goes, as the method has it
    (elsewhere in kvx the lower position stays): a rule whose codes say nothing is a window, not a frozen cache.

    A prompt beyond the budget is worked through token by token under the same rule, each with its own query; the
    outputs of the prompt are those of full attention.

    Attributes:
        budget: slots per KV head.
        bits: length of a code.
        sinks: first tokens of the text, protected.
        recent: tokens before the fresh one, protected.
        seed: of the hyperplanes.
    """

    budget: Amount = static()
    bits: int = static()
    sinks: int = static()
    recent: int = static()
    seed: int = static()
    bounded = True
    overflow = 0

    @property
    def words(self) -> tuple[str, ...]:
        """Names of the statistics that hold a code, a word each."""
        return tuple(f"hash{index}" for index in range(-(-self.bits // WORD)))

    def capacity(self, spec: Spec, layer: int) -> int:
        return max(self.budget.most(spec.prompt), self._least)

    @property
    def _least(self) -> int:
        """With a share of a short prompt the protected tokens win, and one slot must be free to change hands."""
        return self.sinks + self.recent + 1

    def observe(self, prefill: bool) -> Requests:
        return Requests(queries=prefill)

    def stats(self, tokens: Tokens, evidence: Evidence | None, context: Context) -> dict[str, Shaped[Array, "B G T"]]:
        codes = simhash(tokens.rotated_keys, self._planes(tokens.keys.shape[-1], context))
        return {name: codes[..., index] for index, name in enumerate(self.words)}

    def keep(
        self, tokens: Tokens, mask: Bool[Array, "B G T"], evidence: Evidence, context: Context
    ) -> tuple[Tokens, Bool[Array, "B G T"], Int[Array, "B"]]:
        counts = jnp.maximum(self.budget.of(context.lengths, context.spec.prompt), self._least)
        assert evidence.queries is not None, "observe() asked for it"
        planes = self._planes(tokens.keys.shape[-1], context)
        queries = jnp.moveaxis(simhash(evidence.queries, planes), 3, 0)
        length, capacity = mask.shape[-1], min(self.capacity(context.spec, 0), mask.shape[-1])
        present, codes = mask & tokens.present, self._codes(tokens.stats)
        # After a cut, tokens come first whose queries are gone: they are within the budget.
        earlier = length - len(queries)
        holder = jnp.where(present[..., :earlier], jnp.arange(earlier, dtype=jnp.int32), -1)
        holder = jnp.pad(holder, ((0, 0), (0, 0), (0, capacity - earlier)), constant_values=-1)

        def arrive(holder, coming):
            """The token at hand in each slot, -1 for none, after one more token."""
            index, query = coming
            inside = jnp.maximum(holder, 0)
            positions = jnp.where(holder >= 0, jnp.take_along_axis(tokens.positions, inside, axis=-1), -1)
            held = jnp.take_along_axis(codes, inside[..., None], axis=2)
            victim = self.victim(held, positions, query, tokens.positions[..., index])
            full = jnp.sum(holder >= 0, axis=-1) >= counts[:, None]
            slot = jnp.where(full, victim, jnp.argmin(holder, axis=-1))
            here = (jnp.arange(capacity) == slot[..., None]) & present[..., index, None]
            return jnp.where(here, index, holder), None

        holder, _ = jax.lax.scan(arrive, holder, (jnp.arange(earlier, length, dtype=jnp.int32), queries))
        batch, heads = jnp.ogrid[: mask.shape[0], : mask.shape[1]]
        where = (batch[..., None], heads[..., None], jnp.where(holder >= 0, holder, length))
        return tokens, jnp.zeros(mask.shape, bool).at[where].set(True, mode="drop"), counts

    def before(self, store: Any, state: Int[Array, "B"], query: Query, context: Context) -> tuple[Any, Int[Array, "B"]]:
        positions, coming = store.positions(), query.positions[:, :1]
        code = simhash(query.rotated[..., 0, :], self._planes(query.raw.shape[-1], context))
        victim = self.victim(self._codes(store.stats), positions, code, coming)
        full = (jnp.sum(positions >= 0, axis=-1) >= state[:, None]) & (coming >= 0)
        leaves = jnp.arange(positions.shape[-1]) == victim[..., None]
        return store.release(jnp.where(leaves, -1.0, 0.0), full.astype(jnp.int32)), state

    def victim(
        self,
        codes: UInt32[Array, "B G C W"],
        positions: Int[Array, "B G C"],
        query: UInt32[Array, "B G R W"],
        coming: Int[Array, "B #G"],
    ) -> Int[Array, "B G"]:
        """The slot to free for a token at position `coming`: the largest distance, in a tie the lowest position."""
        distance = jnp.sum(hamming(codes[:, :, None], query[:, :, :, None]), axis=2)
        protected = (positions < self.sinks) | (positions >= coming[..., None] - self.recent)
        distance = jnp.where(protected, -1, distance)  # an empty slot stands at -1, below every sink
        tied = distance == jnp.max(distance, axis=-1, keepdims=True)
        return jnp.argmin(jnp.where(tied, positions, jnp.iinfo(jnp.int32).max), axis=-1)

    def _codes(self, stats: Mapping[str, Shaped[Array, "B G T"]]) -> UInt32[Array, "B G T W"]:
        return jnp.stack([stats[name] for name in self.words], axis=-1)

    def _planes(self, dim: int, context: Context) -> Float[Array, "N D"]:
        return hyperplanes(self.seed, context.layer, self.bits, dim)
