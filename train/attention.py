"""Causal attention of whole rows of text, differentiable, on a mesh: each device attends its own rows and heads.

Where tokens stand is known statically here: token i sees tokens 0 to i, if a row is one document. Caches and ragged
prompts cannot promise that, and cuDNN's fused attention asks for it, on GPUs that have it.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from kvx.decoder import AttentionSpec
from kvx.kernels.implementations import target_platform
from kvx.kernels.prefill_attention import prefill_attention
from kvx.mesh import Placement

WIDEST = 128
"""Channels of a head that cuDNN takes on every GPU since Ampere; a multiple of 8."""


def causal_attention(
    queries: Float[Array, "B T H D"],
    keys: Float[Array, "B T G D"],
    values: Float[Array, "B T G V"],
    segments: Int[Array, "B T"] | None,
    spec: AttentionSpec,
    placement: Placement | None = None,
) -> Float[Array, "B T H V"]:
    """Attention output of every query head, in the dtype of the values.

    Args:
        queries, keys: rotated.
        segments: the document of each token, which sees that document only; None: a row is one document.
        spec: scale, window and soft cap.
        placement: of a mesh; None: on one device.
    """
    attend = partial(_attend, spec=spec)
    if placement is None or placement.mesh.size == 1:
        return attend(queries, keys, values, segments)
    # By rows and KV heads nothing crosses; a row whose tokens lie apart is put together, in exchange for heads.
    heads = placement.sharding(keys.shape, ("rows", None, "attention_heads", None)).spec
    rows = PartitionSpec(*heads[:1])
    return jax.shard_map(
        attend,
        mesh=placement.mesh,
        in_specs=(heads, heads, heads, None if segments is None else rows),
        out_specs=heads,
        check_vma=False,
    )(queries, keys, values, segments)


def _attend(queries, keys, values, segments, *, spec: AttentionSpec):
    if target_platform() == "gpu" and segments is None and _fused_takes(queries, values, spec):
        return _fused(queries, keys, values, spec)
    batch, length, kv_heads, _ = keys.shape
    index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    grouped = queries.reshape(batch, length, kv_heads, -1, queries.shape[-1])
    out, _, _ = prefill_attention(
        jnp.transpose(grouped, (0, 2, 3, 1, 4)),
        jnp.swapaxes(keys, 1, 2),
        jnp.swapaxes(values, 1, 2),
        index,
        jnp.broadcast_to(index[:, None], (batch, kv_heads, length)),
        scale=spec.scale,
        window=spec.window,
        softcap=spec.softcap,
        segments=None if segments is None else (segments, segments),
    )
    out = jnp.transpose(out, (0, 3, 1, 2, 4)).reshape(*queries.shape[:3], values.shape[-1])
    return out.astype(values.dtype)


def _fused_takes(queries: Array, values: Array, spec: AttentionSpec) -> bool:
    narrow = max(queries.shape[-1], values.shape[-1]) <= WIDEST
    return queries.dtype in (jnp.bfloat16, jnp.float16) and narrow and spec.softcap is None


def _fused(queries, keys, values, spec: AttentionSpec):
    """cuDNN's attention: keys and values of one width that 8 divides, which zeros make up without changing anything."""
    width = -(-max(queries.shape[-1], values.shape[-1]) // 8) * 8
    wide = [jnp.pad(x, ((0, 0),) * 3 + ((0, width - x.shape[-1]),)) for x in (queries, keys, values)]
    out = jax.nn.dot_product_attention(
        *wide,
        scale=spec.scale,
        is_causal=True,
        local_window_size=None if spec.window is None else (spec.window - 1, 0),
        implementation="cudnn",
    )
    return out[..., : values.shape[-1]]
