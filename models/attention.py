"""Attention inside a decoder layer: what a block asks of it, and the grouped kind with keys and values per head.

A block owns norms and MLP; its attention owns the projections in and out. So a decoder may have one kind of attention
in some layers and another in the rest (`kvx.models.mla`), and neither the block nor the layer loop knows which.
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from kvx.decoder import AttentionSpec
from kvx.models.layers import Linear, RMSNorm, RotaryConstant
from kvx.models.pieces import Piece, qkv_pieces
from kvx.rotary import Rotary


@runtime_checkable
class Attention(Protocol):
    """The projections around one layer's attention; the attention itself is the layer loop's."""

    @property
    def spec(self) -> AttentionSpec:
        """Static facts of what `project` yields."""
        ...

    @property
    def rotary(self) -> Rotary:
        """This layer's rotation."""
        ...

    @property
    def expanded(self) -> Any:
        """The same attention in the form that is cheapest over a whole text, where nothing is cached."""
        ...

    def project(
        self, x: Float[Array, "B T E"]
    ) -> tuple[Float[Array, "B T H D"], Float[Array, "B T G D"], Float[Array, "B T G V"]]:
        """Unrotated queries, keys and values of the normed layer input."""
        ...

    def own(self, rotated: Float[Array, "B T H D"]) -> Float[Array, "B T H K"]:
        """Of rotated queries or keys, the channels that each head itself compares."""
        ...

    def output(self, out: Float[Array, "B T H V"], dtype: DTypeLike) -> Float[Array, "B T E"]:
        """What the layer adds to the residual stream, in `dtype`, from every head's attention output."""
        ...


class GroupedAttention(nnx.Module):
    """Multi-head, grouped or multi-query attention (Ainslie et al. 2023): one key and value per group of query heads.

    Queries, keys and values come from one matrix (E, G, R + 2, D): R query heads, a key and a value for each KV head.
    """

    def __init__(
        self,
        width: int,
        spec: AttentionSpec,
        frequencies: Float[np.ndarray, "P"],
        magnitude: float,
        dtype: np.dtype,
        *,
        qkv_bias: bool = False,
        out_bias: bool = False,
        head_norm: Callable[[], RMSNorm] | None = None,
    ):
        """Born with shapes for parameters.

        Args:
            width: the model's width E.
            frequencies: radians per position, one per pair of channels.
            head_norm: makes the norm of each query or key head; None: heads are not normed.
        """
        self.spec = spec
        self.frequencies = RotaryConstant(jnp.asarray(frequencies))
        self.magnitude = magnitude
        grouped = (spec.kv_heads, spec.group + 2, spec.key_dim)
        self.qkv = Linear(width, grouped, ("embed", "kv_heads", None, None), dtype, qkv_bias)
        self.q_norm = None if head_norm is None else head_norm()
        self.k_norm = None if head_norm is None else head_norm()
        self.out = Linear(spec.heads * spec.value_dim, (width,), ("heads", "embed"), dtype, out_bias)

    @property
    def rotary(self) -> Rotary:
        """This layer's rotation."""
        return Rotary(self.frequencies[...], self.magnitude)

    @property
    def expanded(self) -> "GroupedAttention":
        """Itself: its keys and values are those of its heads already."""
        return self

    def project(
        self, x: Float[Array, "B T E"]
    ) -> tuple[Float[Array, "B T H D"], Float[Array, "B T G D"], Float[Array, "B T G D"]]:
        """Unrotated queries, keys and values of the normed layer input."""
        z = self.qkv(x)
        q, k, v = z[..., :-2, :], z[..., -2, :], z[..., -1, :]
        q = q.reshape(*x.shape[:2], self.spec.heads, self.spec.key_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def own(self, rotated: Float[Array, "B T H D"]) -> Float[Array, "B T H D"]:
        """All of them."""
        return rotated

    def output(self, out: Float[Array, "B T H V"], dtype: DTypeLike) -> Float[Array, "B T E"]:
        """What the layer adds to the residual stream, in `dtype`, from every head's attention output."""
        return self.out(out.reshape(*out.shape[:2], -1).astype(dtype))

    def pieces(self, prefix: str) -> Iterator[Piece]:
        """Where every tensor of a Hugging Face checkpoint lives, under `prefix`."""
        yield from qkv_pieces(prefix, self.qkv.kernel, "matrix", "weight")
        if self.qkv.bias is not None:
            yield from qkv_pieces(prefix, self.qkv.bias, "vector", "bias")
        if self.q_norm is not None and self.k_norm is not None:
            yield Piece(f"{prefix}.q_norm.weight", self.q_norm.weight, "vector")
            yield Piece(f"{prefix}.k_norm.weight", self.k_norm.weight, "vector")
        yield Piece(f"{prefix}.o_proj.weight", self.out.kernel, "matrix")
        if self.out.bias is not None:
            yield Piece(f"{prefix}.o_proj.bias", self.out.bias, "vector")
