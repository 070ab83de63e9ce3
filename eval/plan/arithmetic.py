"""Operations that a model's forward pass takes, by layer, since a policy may send fewer tokens on to the next one."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kvx.context import Spec
from kvx.decoder import AttentionSpec, Decoder
from kvx.policy import Policy


def prompt_operations(model: Decoder, policy: Policy, length: int, width: int) -> float:
    """For one row's prompt: products with weights, causal attention, and logits after the last token.

    FLOP(S) = sum over layers (2 P s + H (D + V) s^2) + 2 N E, with s tokens in a layer (S, unless the policy sends
    fewer on), P entries of its matrices, N token ids and width E. Attention is counted causal, half of all pairs: the
    published seconds of the model of cost imply a quarter.

    Args:
        model: arrays or shapes.
        length: tokens S of the prompt.
        width: tokens that it is padded to, by which the policy bounds what goes on; the padding itself is not counted.
    """
    layers = len(model.blocks)
    going, total = length, 0.0
    for layer, (block, attention) in enumerate(zip(model.blocks, _attention(model), strict=True)):
        pairs = going * going / 2
        total += 2.0 * entries(block) * going
        total += 2.0 * attention.heads * (attention.key_dim + attention.value_dim) * pairs
        spec = Spec(block.spec, layers, width, length, 0)
        left = policy.at(layer, layers).remaining(spec, layer)
        going = going if left is None else min(going, left)
    return total + _logits(model)


def token_operations(model: Decoder) -> float:
    """For one token, in products with weights: 2 (P + N E)."""
    return 2.0 * sum(entries(block) for block in model.blocks) + _logits(model)


def entries(module: Any) -> int:
    """Entries of a module's matrices: each takes two operations a token."""
    leaves = jax.tree.leaves(module, is_leaf=lambda node: isinstance(node, nnx.Variable))
    arrays = [leaf.get_value() for leaf in leaves if isinstance(leaf, nnx.Param)]
    return sum(array.size for array in arrays if array.ndim > 1)


def _attention(model: Decoder) -> list[AttentionSpec]:
    """Of each layer, in the form for whole texts; traced, since a model of shapes cannot be taken apart."""
    found: list[AttentionSpec] = []
    jax.eval_shape(lambda model: found.extend(block.expanded.spec for block in model.blocks), model)
    return found


def _logits(model: Decoder) -> float:
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    width = jax.eval_shape(lambda model, token: model.embed(token), model, token).shape[-1]
    return 2.0 * model.vocabulary * width
