"""One call as its implementations take it: query rows by KV head, operands, and which slots each row sees."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvx.kernels.decode_attention.operands import Operand, Rows, Tail
from kvx.kernels.logits import scaled_logits, visible
from kvx.kernels.merge_partials import Partial


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Call:
    """Operands and static facts of one call.

    Attributes:
        queries: rows r * T + t of a KV head's R query heads and T queries.
        positions: the queries' true positions; None: every query sees every slot.
        slots: true positions of the slots; None: all are there.
        lengths: slots in use of each head, the first ones; None: all.
        bias: added to a slot's logits.
        logits: whether the masked logits are wanted too.
    """

    queries: Float[Array, "B G Q D"]
    keys: Operand
    values: Operand
    positions: Int[Array, "B T"] | None
    slots: Int[Array, "B G C"] | None
    lengths: Int[Array, "B G"] | None
    bias: Float[Array, "B G C"] | None
    tail: Tail | None
    length: int = field(metadata={"static": True})
    scale: float = field(metadata={"static": True})
    window: int | None = field(metadata={"static": True})
    softcap: float | None = field(metadata={"static": True})
    logits: bool = field(metadata={"static": True})

    @property
    def row_positions(self) -> Int[Array, "B Q"] | None:
        """Positions by query row."""
        return None if self.positions is None else jnp.tile(self.positions, (1, self.queries.shape[2] // self.length))

    @property
    def dtype(self) -> jax.typing.DTypeLike:
        """Of the products: float32 where any operand is, so that nothing of it is rounded; else bfloat16."""
        stored = [operand.array.dtype for operand in (self.keys, self.values) if isinstance(operand, Rows)]
        return jnp.float32 if jnp.float32 in (self.queries.dtype, *stored) else jnp.bfloat16

    def seen(self) -> Bool[Array, "B #G #Q C"] | None:
        """Which slots each row sees; None: all of them."""
        masks = []
        if self.slots is not None and self.row_positions is not None:
            masks.append(visible(self.row_positions[:, None, :, None], self.slots[:, :, None, :], self.window))
        if self.lengths is not None:
            masks.append((jnp.arange(self.keys.slots) < self.lengths[..., None])[:, :, None])
        return masks[0] & masks[1] if len(masks) == 2 else (masks[0] if masks else None)

    def tail_seen(self) -> Bool[Array, "B G #Q E"]:
        """Which entries of the tail each row sees."""
        assert self.tail is not None, "asked for where there is one"
        entries = self.tail.positions[:, :, None, :]
        return (
            entries >= 0
            if self.row_positions is None
            else visible(self.row_positions[:, None, :, None], entries, self.window)
        )


Found = tuple[Partial, Float[Array, "B G Q N"] | None]
"""What an implementation returns: rows' partials, and masked logits of slots and tail if they were asked for."""


def with_tail_logits(call: Call, logits: Float[Array, "B G Q C"]) -> Float[Array, "B G Q N"]:
    """A kernel's logits of the slots made whole: -inf where blocks were skipped, and the few of the tail."""
    if call.lengths is not None:
        behind = jnp.arange(call.keys.slots) >= call.lengths[..., None]
        logits = jnp.where(behind[:, :, None], -jnp.inf, logits)
    if call.tail is None:
        return logits
    exact = scaled_logits(call.queries, call.tail.keys, call.scale, call.softcap)
    return jnp.concatenate([logits, jnp.where(call.tail_seen(), exact, -jnp.inf)], axis=-1)
