"""Multi-head latent attention (DeepSeek-V2 2024, section 2.1): keys and values of all heads from one latent per token.

For normed input x, latent c, rotary key k (p channels, in G equal blocks) and query head h that reads block b(h):

    c = norm?(W_a x)        k = W_r x        q_h = [q_h^content ; q_h^rotary] = W_q^h norm?(W_qa x)
    key_h = [W_UK^h c ; R k_b(h)]            value_h = W_UV^h c            out = W_O concat(attention_h)

One block is DeepSeek's shared rotary key; one block per group of query heads is MHA2MLA's (2025). Two forms of the
same maths: *expanded*, with H keys and values per token, for whole texts and gradients; *absorbed*, for the cache,
where W_UK moves to the query and W_UV to the output, so that a token is one row [k ; c] which serves as key, and its
last `rank` channels as value:

    q_h . key_h = [q_h^rotary placed in its block ; W_UK^hT q_h^content] . [k ; c]       value: c, then W_UV^h

In memory rotary channels are half-split over the whole width, as `kvx.rotary.Rotary` turns them: the real parts of all
blocks' pairs, then the imaginary ones. A key's bias on its content is missing on purpose: it adds the same to every
logit of a query, so softmax drops it; a value's bias is one on the output.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from kvx.decoder import AttentionSpec
from kvx.errors import BadInput
from kvx.models.layers import Linear, RMSNorm, RotaryConstant
from kvx.models.pieces import Piece
from kvx.rotary import Rotary

EPSILON = 1e-6
"""Of the norms on latents, DeepSeek's whatever the model's own."""


@dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """Widths and switches of one latent attention layer.

    Attributes:
        heads: query heads H.
        rank: latent channels r.
        rotary: channels p of a token's rotary key, all blocks together; even, 0 for none.
        blocks: rotary keys a token, each of rotary / blocks channels; query head h reads block h // (H / blocks).
        content: channels of a query head that meet the latent (DeepSeek's qk_nope_head_dim).
        value: channels of a head's value.
        query_rank: channels of the query's own latent; None: queries come straight from the input.
        latent_norm: RMS norm on the latent, before it is cached.
        query_norm: RMS norm on the query's latent.
        scale: factor on q . k before the softmax.
        bias: on the queries (all their channels) and on [latent ; rotary key].
        out_bias: on the output.
    """

    heads: int
    rank: int
    rotary: int
    content: int
    value: int
    scale: float
    blocks: int = 1
    query_rank: int | None = None
    latent_norm: bool = False
    query_norm: bool = False
    bias: bool = False
    out_bias: bool = False

    def __post_init__(self) -> None:
        for name, least in (("heads", 1), ("rank", 1), ("rotary", 0), ("blocks", 1), ("content", 0), ("value", 1)):
            size = getattr(self, name)
            if type(size) is not int or size < least:
                raise BadInput(f"{name}={size!r} of latent attention: expected an integer of at least {least}")
        if self.query_rank is not None and (type(self.query_rank) is not int or self.query_rank < 1):
            raise BadInput(
                f"query_rank={self.query_rank!r} of latent attention: expected an integer of at least 1, or None"
            )
        if self.heads % self.blocks:
            raise BadInput(f"blocks={self.blocks} of latent attention: expected a divisor of heads={self.heads}")
        if self.rotary % (2 * self.blocks):
            raise BadInput(
                f"rotary={self.rotary} of latent attention: expected a multiple of {2 * self.blocks}, pairs of channels"
                f" in each of blocks={self.blocks}"
            )
        if self.key == 0:
            raise BadInput("content=0 and rotary=0 of latent attention: expected a query of at least one channel")
        if self.query_norm and self.query_rank is None:
            raise BadInput("query_norm=True of latent attention: expected False where query_rank is None")
        if not (isinstance(self.scale, int | float) and math.isfinite(self.scale) and self.scale > 0):
            raise BadInput(f"scale={self.scale!r} of latent attention: expected a finite number above 0")

    @property
    def block(self) -> int:
        """Rotary channels that a query head reads."""
        return self.rotary // self.blocks

    @property
    def key(self) -> int:
        """Channels of a query head, content and rotary (DeepSeek's qk_head_dim)."""
        return self.content + self.block

    @property
    def cached(self) -> int:
        """Numbers that the cache holds of a token: the rotary key and the latent."""
        return self.rotary + self.rank


class LatentAttention(nnx.Module):
    """Latent attention in its absorbed form; satisfies `kvx.models.attention.Attention`.

    Parameters: `q` (E, H, content + rotary / blocks), or `q_a` (E, query_rank), `q_norm`, `q_b`; `kv_a` (E, rank +
    rotary), latent first; `kv_norm`; `kv_b` (rank, H, content + value), a head's key rows first; `out` (H value, E).
    """

    def __init__(
        self,
        width: int,
        config: LatentConfig,
        frequencies: Float[np.ndarray, "P"],
        magnitude: float,
        dtype: np.dtype,
        window: int | None = None,
        softcap: float | None = None,
    ):
        """Born with shapes for parameters.

        Args:
            width: the model's width E.
            frequencies: radians per position, one per rotary pair, block after block; any values.
            magnitude: factor on cos and sin.
            window, softcap: as in `kvx.decoder.AttentionSpec`.
        """
        c = config
        self.config = c
        self.spec = AttentionSpec(c.heads, 1, c.cached, c.rank, c.scale, window, softcap, latent=True)
        self.frequencies = RotaryConstant(jnp.asarray(frequencies, jnp.float32))
        self.magnitude = magnitude
        heads, query_rank = (c.heads, c.key), c.query_rank
        self.q = Linear(width, heads, ("embed", "heads", None), dtype, c.bias) if query_rank is None else None
        self.q_a = None if query_rank is None else Linear(width, (query_rank,), ("embed", None), dtype)
        self.q_norm = RMSNorm(query_rank, EPSILON, dtype) if c.query_norm and query_rank is not None else None
        self.q_b = None if query_rank is None else Linear(query_rank, heads, (None, "heads", None), dtype, c.bias)
        self.kv_a = Linear(width, (c.rank + c.rotary,), ("embed", None), dtype, c.bias)
        self.kv_norm = RMSNorm(c.rank, EPSILON, dtype) if c.latent_norm else None
        self.kv_b = Linear(c.rank, (c.heads, c.content + c.value), (None, "heads", None), dtype)
        self.out = Linear(c.heads * c.value, (width,), ("heads", "embed"), dtype, c.out_bias)

    @property
    def rotary(self) -> Rotary:
        """This layer's rotation, of the first `rotary` channels."""
        return Rotary(self.frequencies[...], self.magnitude)

    @property
    def expanded(self) -> "ExpandedLatent":
        """The form with keys and values of every head."""
        return ExpandedLatent(self)

    def project(
        self, x: Float[Array, "B T E"]
    ) -> tuple[Float[Array, "B T H D"], Float[Array, "B T 1 D"], Float[Array, "B T 1 V"]]:
        """Unrotated absorbed queries, the one row [rotary key ; latent], and as values its latent."""
        placed, content = self.queries(x)
        turned, latent = self.row(x)
        absorbed = jnp.einsum("bthn,rhn->bthr", content, self.kv_b.kernel[..., : self.config.content])
        keys = jnp.concatenate([turned, latent], axis=-1)[:, :, None]
        return jnp.concatenate([placed, absorbed], axis=-1), keys, latent[:, :, None]

    def own(self, rotated: Float[Array, "B T H D"]) -> Float[Array, "B T H D"]:
        """All of them: one row serves all heads."""
        return rotated

    def output(self, out: Float[Array, "B T H R"], dtype: DTypeLike) -> Float[Array, "B T E"]:
        """What the layer adds to the residual stream, in `dtype`, from every head's mean latent."""
        values = jnp.einsum("bthr,rhv->bthv", out.astype(dtype), self.kv_b.kernel[..., self.config.content :])
        return self.out(values.reshape(*out.shape[:2], -1))

    def queries(self, x: Float[Array, "B T E"]) -> tuple[Float[Array, "B T H P"], Float[Array, "B T H N"]]:
        """Every head's unrotated rotary channels, in the block it reads and zero in the others; and its content."""
        c = self.config
        if self.q is not None:
            q = self.q(x)
        else:
            assert self.q_a is not None and self.q_b is not None, "there is one or the other"
            low = self.q_a(x)
            q = self.q_b(low if self.q_norm is None else self.q_norm(low))
        rotary = q[..., c.content :]
        if c.blocks > 1:
            halves = rotary.reshape(*rotary.shape[:3], 2, 1, c.block // 2)
            rotary = jnp.where(_read_blocks(c), halves, 0).reshape(*rotary.shape[:3], c.rotary)
        return rotary, q[..., : c.content]

    def row(self, x: Float[Array, "B T E"]) -> tuple[Float[Array, "B T P"], Float[Array, "B T R"]]:
        """A token's unrotated rotary key, and its latent as it is cached."""
        z = self.kv_a(x)
        latent, turned = z[..., : self.config.rank], z[..., self.config.rank :]
        return turned, latent if self.kv_norm is None else self.kv_norm(latent)

    def pieces(self, prefix: str) -> Iterator[Piece]:
        """Where every tensor lives, under `prefix` and DeepSeek's names: rotary rows there pair neighbours."""
        c = self.config
        head = np.s_[..., _file_order(c.content, c.block)]
        if self.q is not None:
            yield from _linear(f"{prefix}.q_proj", self.q, head)
        if self.q_a is not None and self.q_b is not None:
            yield Piece(f"{prefix}.q_a_proj.weight", self.q_a.kernel, "matrix")
            if self.q_norm is not None:
                yield Piece(f"{prefix}.q_a_layernorm.weight", self.q_norm.weight, "vector")
            yield from _linear(f"{prefix}.q_b_proj", self.q_b, head)
        yield from _linear(f"{prefix}.kv_a_proj_with_mqa", self.kv_a, np.s_[..., _file_order(c.rank, c.rotary)])
        if self.kv_norm is not None:
            yield Piece(f"{prefix}.kv_a_layernorm.weight", self.kv_norm.weight, "vector")
        yield Piece(f"{prefix}.kv_b_proj.weight", self.kv_b.kernel, "matrix")
        yield from _linear(f"{prefix}.o_proj", self.out, ...)


@dataclass(frozen=True)
class ExpandedLatent:
    """Latent attention with H keys and values per token, as gradients and whole texts want it (naive form).

    Every head's key holds all rotary blocks, though its query reads one: so one rotation serves blocks whose
    frequencies differ.
    """

    latent: LatentAttention

    @property
    def spec(self) -> AttentionSpec:
        """Static facts of this form."""
        c, absorbed = self.latent.config, self.latent.spec
        return AttentionSpec(
            c.heads, c.heads, c.rotary + c.content, c.value, c.scale, absorbed.window, absorbed.softcap
        )

    @property
    def rotary(self) -> Rotary:
        """This layer's rotation, of the first `rotary` channels."""
        return self.latent.rotary

    @property
    def expanded(self) -> "ExpandedLatent":
        """Itself."""
        return self

    def project(
        self, x: Float[Array, "B T E"]
    ) -> tuple[Float[Array, "B T H D"], Float[Array, "B T H D"], Float[Array, "B T H V"]]:
        """Unrotated queries, keys and values of every head."""
        c = self.latent.config
        turned, latent = self.latent.row(x)
        both = self.latent.kv_b(latent)
        shared = jnp.broadcast_to(turned[:, :, None], (*both.shape[:3], c.rotary))
        keys = jnp.concatenate([shared, both[..., : c.content]], axis=-1)
        return jnp.concatenate(self.latent.queries(x), axis=-1), keys, both[..., c.content :]

    def own(self, rotated: Float[Array, "B T H D"]) -> Float[Array, "B T H K"]:
        """Of rotated queries or keys, the block that the head reads, and its content."""
        c = self.latent.config
        if c.blocks == 1:
            return rotated
        blocks = rotated[..., : c.rotary].reshape(*rotated.shape[:3], 2, c.blocks, c.block // 2)
        block = jnp.sum(jnp.where(_read_blocks(c), blocks, 0), axis=-2)
        return jnp.concatenate([block.reshape(*rotated.shape[:3], c.block), rotated[..., c.rotary :]], axis=-1)

    def output(self, out: Float[Array, "B T H V"], dtype: DTypeLike) -> Float[Array, "B T E"]:
        """What the layer adds to the residual stream, in `dtype`, from every head's attention output."""
        return self.latent.out(out.reshape(*out.shape[:2], -1).astype(dtype))


def _read_blocks(config: LatentConfig) -> Bool[np.ndarray, "H 1 N 1"]:
    """Which of the rotary key's N blocks each head reads, before (2, N, pairs of a block)."""
    mine = np.arange(config.heads)[:, None] // (config.heads // config.blocks) == np.arange(config.blocks)
    return mine[:, None, :, None]


def _file_order(plain: int, rotary: int) -> np.ndarray:
    """For each channel of a file, in which rotary pairs are neighbours behind `plain` channels, its place in memory."""
    turned = np.arange(rotary).reshape(2, -1).T.reshape(-1)
    return np.concatenate([np.arange(plain), plain + turned])


def _linear(name: str, linear: Linear, index: object) -> Iterator[Piece]:
    yield Piece(f"{name}.weight", linear.kernel, "matrix", index)
    if linear.bias is not None:
        yield Piece(f"{name}.bias", linear.bias, "vector", index)
