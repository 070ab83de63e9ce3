"""How much arithmetic training takes, and what the chips could do: the two numbers behind MFU.

MFU (Chowdhery et al. 2022, appendix B) is the share of a chip's peak that the model's own arithmetic uses: two
operations for every weight and token in a forward pass, as many again for the gradient of the activations, and for that
of weights which train. What is computed twice to save memory does not count.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kvx.decoder import Decoder

PEAK = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}
"""Dense bfloat16 operations per second and chip, by the beginning of its name in JAX (vendors' data sheets)."""


def peak(device: jax.Device) -> float | None:  # type: ignore[valid-type] # jaxlib has no stubs
    """Of one chip; None where no one publishes it, as for a CPU."""
    kinds = [kind for kind in PEAK if device.device_kind.startswith(kind)]
    return PEAK[max(kinds, key=len)] if kinds else None


def forward_flops(model: Decoder, length: int) -> tuple[float, float]:
    """Operations of a forward pass per token, in all and in products with weights alone.

    Args:
        model: its parameters may be shapes.
        length: tokens of a row, of which one sees half on average.
    """
    blocks = sum(_matrices(block) for block in model.blocks)
    # The output matrix is a table with an entry for every token id and channel, tied or not.
    row = jax.eval_shape(lambda model, tokens: model.embed(tokens), model, jax.ShapeDtypeStruct((1, 1), jnp.int32))
    weights = 2.0 * (blocks + model.vocabulary * row.shape[-1])
    specs = [block.expanded.spec for block in model.blocks]
    attention = sum(2.0 * spec.heads * (spec.key_dim + spec.value_dim) * length / 2 for spec in specs)
    return weights + attention, weights


def training_flops(student: Decoder, trained: float, teacher: Decoder | None, length: int) -> float:
    """Operations of a training step per token.

    Args:
        trained: the share of the student's parameters that train.
        teacher: runs forward only; None: there is none.
    """
    forward, weights = forward_flops(student, length)
    # Attention's backward pass is twice its forward pass; a frozen matrix passes gradients on and has none of its own.
    step = 2 * forward + weights * trained + (forward - weights)
    return step + (0.0 if teacher is None else forward_flops(teacher, length)[0])


def _matrices(tree: Any) -> int:
    leaves = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, nnx.Variable))
    return sum(leaf.get_value().size for leaf in leaves if isinstance(leaf, nnx.Param) and leaf.get_value().ndim > 1)
