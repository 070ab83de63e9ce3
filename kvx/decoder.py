"""What the spine asks of a model: three pure functions a layer, and static facts about its attention.

A model never sees a cache. It embeds tokens, projects queries, keys and values (unrotated), and takes the attention
output back; the layer loop (`kvx.loop`, `kvx.step`) does everything between. No method needs a hook inside a model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

from jaxtyping import Array, Float, Int

from kvx.rotary import Rotary


@dataclass(frozen=True)
class AttentionSpec:
    """Static facts of one layer's attention; layers with equal specs share one compiled body.

    Attributes:
        heads: query heads H. Query head h reads KV head h // (H / G).
        kv_heads: KV heads G; divides `heads`.
        key_dim: width D of queries and keys.
        value_dim: width of values and of the attention output per head.
        scale: factor on q . k before the softmax.
        window: sliding window: a key at position j is visible from i if 0 <= i - j < window. None: full causal.
        softcap: logits become softcap * tanh(logits / softcap). None: not capped.
        latent: a token's value is the last `value_dim` channels of its key, which no rotation turns, so that a cache
            keeps them once (`kvx.tokens.attended_values`).
    """

    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None
    latent: bool = False

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads

    def only(self, kv_heads: int) -> "AttentionSpec":
        """The same attention of fewer KV heads, with the query heads that read them."""
        return replace(self, heads=kv_heads * self.group, kv_heads=kv_heads)


@runtime_checkable
class Block(Protocol):
    """One decoder layer."""

    @property
    def spec(self) -> AttentionSpec:
        """Static facts of its attention."""
        ...

    @property
    def rotary(self) -> Rotary:
        """This layer's rotation."""
        ...

    @property
    def expanded(self) -> "Block":
        """The same layer in the form for whole texts, with keys and values of its heads; asked of latent layers."""
        ...

    def project(
        self, x: Float[Array, "B T E"]
    ) -> tuple[Float[Array, "B T H D"], Float[Array, "B T G D"], Float[Array, "B T G V"]]:
        """Queries, keys, values of the layer's input: normed, biased, QK-normed, but not rotated."""
        ...

    def finish(self, x: Float[Array, "B T E"], out: Float[Array, "B T H V"]) -> Float[Array, "B T E"]:
        """The layer's output from its input and the attention output of every head."""
        ...


@runtime_checkable
class Decoder(Protocol):
    """A decoder-only language model as the spine uses it; an nnx.Module of `kvx.models` is one."""

    @property
    def blocks(self) -> Sequence[Block]:
        """The layers, lowest first."""
        ...

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        ...

    @property
    def max_positions(self) -> int:
        """The longest text it was made for."""
        ...

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T E"]:
        """The input of the first block."""
        ...

    def unembed(self, x: Float[Array, "... E"]) -> Float[Array, "... N"]:
        """float32 logits of the last block's output: final norm, output matrix, soft cap."""
        ...
