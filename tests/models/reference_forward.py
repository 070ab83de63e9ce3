"""A plain forward pass over the three functions of a block: naive softmax attention, one head at a time."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def reference_forward(model, tokens: Int[Array, "B T"]) -> Float[Array, "B T N"]:
    """float32 logits; needs T x T memory a head."""
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    ages = positions[:, None] - positions[None, :]
    x = model.embed(tokens)
    for block in model.blocks:
        spec = block.spec
        q, k, v = block.project(x)
        q, k = (block.rotary(a, positions[:, None]) for a in (q, k))
        visible = ages >= 0 if spec.window is None else (ages >= 0) & (ages < spec.window)
        heads = []
        for head in range(spec.heads):
            kv = head // spec.group
            logits = spec.scale * jnp.einsum("btd,bsd->bts", q[:, :, head], k[:, :, kv])
            if spec.softcap is not None:
                logits = spec.softcap * jnp.tanh(logits / spec.softcap)
            weights = jax.nn.softmax(jnp.where(visible, logits.astype(jnp.float32), -jnp.inf), axis=-1)
            heads.append(jnp.einsum("bts,bsd->btd", weights, v[:, :, kv].astype(jnp.float32)))
        x = block.finish(x, jnp.stack(heads, axis=2))
    return model.unembed(x)
