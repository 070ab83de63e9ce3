"""cuDNN's flash attention for whole causal prompts: the fastest first pass on a GPU, and its own backward pass.

`jax.nn.dot_product_attention` reaches it too, but rounds the log-sum-exp to the inputs' dtype (two per cent of a
probability in bfloat16) and wants heads behind tokens, a transposed copy of everything. The function beneath it keeps
float32 and takes the arrays as they lie; it is internal to JAX, so that every use of it is in this file.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

DTYPES = (jnp.bfloat16, jnp.float16)
WIDEST = 128
"""Head dims beyond it are slower there than through Triton, or have no backward pass."""


def available() -> bool:
    """Whether this process computes on a GPU that cuDNN's attention supports, and this JAX offers it."""
    if jax.default_backend() != "gpu":
        return False
    try:
        from jax._src.cudnn import fused_attention_stablehlo as fused

        return fused.check_cudnn_version() >= 8904 and fused.check_compute_capability("8.0")
    except (ImportError, AttributeError, RuntimeError):
        return False


def takes(queries: Array, keys: Array, values: Array) -> bool:
    """Whether dtype and head dim are its."""
    dim = queries.shape[-1]
    same = queries.dtype == keys.dtype == values.dtype and values.shape[-1] == dim
    return same and queries.dtype in DTYPES and dim <= WIDEST and dim % 8 == 0


def attend(
    queries: Float[Array, "B G R T D"], keys: Float[Array, "B G T D"], values: Float[Array, "B G T D"], scale: float
) -> tuple[Float[Array, "B G R T D"], Float[Array, "B G R T"]]:
    """Causal attention: output in the inputs' dtype, float32 log-sum-exp. The derivative is of the output alone.

    Padding that comes last is seen by padding only, so that no lengths need be told; what it gives itself is for the
    caller to clear.
    """
    from jax._src.cudnn import fused_attention_stablehlo as fused

    batch, kv_heads, group, length, dim = queries.shape
    result: Any = fused.dot_product_attention(
        queries.reshape(batch, kv_heads * group, length, dim),
        keys,
        values,
        scale=scale,
        mask_type=fused.MaskType.CAUSAL,
        qkv_layout="BNTH",
        return_residual=True,
    )
    out, lse = result
    return out.reshape(queries.shape), lse.reshape(queries.shape[:-1])
