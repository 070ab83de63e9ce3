"""The stage that thins generated tokens block by block, when they have left the window of the last ones."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Shaped

from kvx.context import Context, Spec
from kvx.evidence import Evidence, Requests
from kvx.kernels.prefill_attention.columns import risen, share_of
from kvx.parts.thin import cosine
from kvx.pytree import pytree, static
from kvx.stage import Stage
from kvx.tokens import Tokens


@pytree
class CutBlocks(Stage):
    """When `block` generated tokens have left the last R + 1, those of them with the most votes stay.

    The last R + 1 queries vote, as in `kvx.parts.thin`, R = floor(recent * prompt). Which queries vote on a block, and
    with what weight, is known as soon as the token is there: with E tokens a block, generated token n is in block
    b = floor(n / E), which queries (b + 1) E to (b + 1) E + R vote on. So a token's votes are added up as they come,
    one number a token, and the (R + 1) x S buffer of recent rows that the rule suggests is never held.

    The prompt stays. A slot holds the same token in every KV head, and a whole block leaves dense slots at once: so no
    other selection, and no packed store, can be chained with it.

    Attributes:
        recent: share of the prompt.
        block: tokens a block.
        share: of a block, what stays in the first layer; at least one token does.
        last: upwards, the share falls to this part of itself, by a cosine.
        rise: what the last query's vote counts for.
    """

    recent: float = static()
    block: int = static(16)
    share: float = static(0.9)
    last: float = static(0.1)
    rise: float = static(1.2)
    evicts = True  # type: ignore[assignment]
    unchained = True

    def observe(self, prefill: bool) -> Requests:
        return Requests() if prefill else Requests(rows=1)

    def growth(self, spec: Spec, layer: int) -> int:
        recent = share_of(np.arange(spec.shortest, spec.prompt + 1, dtype=np.int32), self.recent) + 1
        cuts = np.maximum((spec.room - recent) // self.block, 0)
        stays = int(self._stays(spec.layers)[layer])
        # The most are held just before the last cut, or at the end.
        before = recent + self.block + (cuts - 1) * stays
        after = spec.room - cuts * (self.block - stays)
        return int(np.where(cuts > 0, np.maximum(before, after), spec.room).max())

    def stats(self, tokens: Tokens, evidence: Evidence | None, context: Context) -> dict[str, Shaped[Array, "B G T"]]:
        return {"votes": jnp.zeros(tokens.positions.shape, jnp.float32)}

    def keep(
        self, tokens: Tokens, mask: Bool[Array, "B G T"], evidence: Evidence, context: Context
    ) -> tuple[Tokens, Bool[Array, "B G T"], tuple[Int[Array, "B"], Int[Array, "B"]]]:
        """The state: tokens of prompt and window together, and R."""
        earlier = share_of(context.lengths, self.recent)
        return tokens, mask, (context.lengths + earlier + 1, earlier)

    def step(self, store: Any, state: Any, evidence: Evidence, context: Context) -> tuple[Any, Any]:
        filled, earlier = (number[:, None, None] for number in state)
        prompt, positions = filled - earlier - 1, store.positions()
        past = evidence.seen[:, None, None] - filled
        index = positions - prompt
        first = (index // self.block + 1) * self.block
        weight = jnp.where(index >= 0, risen(past + earlier - first, earlier, self.rise), 0.0)
        received = jnp.mean(evidence.last_rows(1)[..., 0, :], axis=(1, 2))
        votes = store.stats["votes"] + weight * received[:, None]
        store = store.with_stats({**store.stats, "votes": votes})
        due = (past >= self.block) & (past % self.block == 0)
        block = due & (index >= past - self.block) & (index < past)
        stays = jnp.asarray(self._stays(context.spec.layers))[context.layer]
        # A row that has ended comes here again with the same count; its block has been cut by then.
        excess = jnp.maximum(jnp.sum(block, axis=-1) - stays, 0)
        return store.release(jnp.where(block, votes, jnp.inf), excess, self.block - 1), state

    def _stays(self, layers: int) -> Int[np.ndarray, "L"]:
        """Tokens of a block that stay, by layer."""
        stays = np.floor(self.block * self.share * cosine(self.last, layers) + 1e-5)
        return np.maximum(stays, 1).astype(np.int32)
