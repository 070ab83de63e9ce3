"""The layers that the Llama and Gemma families share: linear, RMS norm, gated MLP, token embedding.

Every module is born with shapes for parameters (`jax.ShapeDtypeStruct`); `kvx.models.build` fills them. Each
parameter names its axes in `axes` ("vocabulary", "embed", "kv_heads", "heads" for all heads' outputs in one, "mlp",
None for the rest), so that sharding rules need not know positions.

How matrices lie in memory, and why: SmolLM2-135M decodes on a CPU at the speed of its weight reads, so this was
measured (30 layers, compiled loop, float32, 2 cores, jax 0.10.2). A matrix is stored (in, *out): at one row a step
as fast as (out, in) within noise, at four rows 1.2 times faster (38 against 46 ms a step). Queries, keys and values
are one matrix, and so are gate and up: 1.07 to 1.12 times faster at one row than separate ones (21.8 against 23.3
and 23.7 against 26.5 ms), equal at four rows and in prefill. The fused axes stay separate dimensions, so that each
can be sharded, and slicing a part out is a plain index. The embedding keeps its file layout (vocabulary, width):
as the output matrix it is 1.15 times faster at one row than its transpose (2.2 against 2.6 ms).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int


class RotaryConstant(nnx.Variable):
    """Rotary frequencies: an array leaf of the model that is not a parameter, so it is moved but never trained."""


def parameter(shape: tuple[int, ...], dtype: np.dtype, axes: tuple[str | None, ...]) -> nnx.Param:
    """A parameter without an array yet; `axes` names each dimension."""
    return nnx.Param(jax.ShapeDtypeStruct(shape, dtype), axes=axes)


class Linear(nnx.Module):
    """y = x W + b with W (in, *out): the output may have several dimensions."""

    def __init__(
        self, inputs: int, outputs: tuple[int, ...], axes: tuple[str | None, ...], dtype: np.dtype, bias: bool = False
    ):
        self.kernel = parameter((inputs, *outputs), dtype, axes)
        self.bias = parameter(outputs, dtype, axes[1:]) if bias else None

    def __call__(self, x: Float[Array, "*batch I"]) -> Float[Array, "..."]:
        """(..., in) to (..., *out), in the dtype of x."""
        y = jnp.tensordot(x, self.kernel[...], axes=1)
        return y if self.bias is None else y + self.bias[...]


class RMSNorm(nnx.Module):
    """x / rms(x) * (offset + w) over the last axis (Zhang and Sennrich 2019); statistics in float32.

    Gemma stores its weights around zero (offset 1), everyone else around one (offset 0).
    """

    def __init__(self, width: int, epsilon: float, dtype: np.dtype, offset: float = 0.0):
        self.weight = parameter((width,), dtype, (None,))
        self.epsilon = epsilon
        self.offset = offset

    def __call__(self, x: Float[Array, "*batch E"]) -> Float[Array, "*batch E"]:
        """Same shape and dtype as x."""
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
        return (normed * (self.offset + self.weight[...].astype(jnp.float32))).astype(x.dtype)


class GatedMLP(nnx.Module):
    """down(activation(gate(x)) * up(x)) (Shazeer 2020); gate and up are one matrix (in, 2, F)."""

    def __init__(
        self, width: int, hidden: int, activation: Callable[[Array], Array], dtype: np.dtype, bias: bool = False
    ):
        self.gate_up = Linear(width, (2, hidden), ("embed", None, "mlp"), dtype, bias)
        self.down = Linear(hidden, (width,), ("mlp", "embed"), dtype, bias)
        self.activation = activation

    def __call__(self, x: Float[Array, "*batch E"]) -> Float[Array, "*batch E"]:
        """Same shape and dtype as x."""
        z = self.gate_up(x)
        return self.down(self.activation(z[..., 0, :]) * z[..., 1, :])


class Embedding(nnx.Module):
    """A table (vocabulary, width), read by rows as the input and multiplied by as the output.

    A tied model calls `logits` of the table it embeds with: two names for one array would become two leaves.
    """

    def __init__(self, vocabulary: int, width: int, dtype: np.dtype):
        self.table = parameter((vocabulary, width), dtype, ("vocabulary", "embed"))

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T E"]:
        """The rows of `tokens`."""
        return self.table[...][tokens]

    def logits(self, x: Float[Array, "*batch E"]) -> Float[Array, "*batch N"]:
        """x times the transposed table, accumulated and returned in float32."""
        return jnp.einsum("...e,ne->...n", x, self.table[...], preferred_element_type=jnp.float32)
