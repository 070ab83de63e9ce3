"""The optimizer of a stage: AdamW under a schedule, gradients clipped by their global norm."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from kvx.mesh import Placement
from kvx.train.stage import StageSection


def steps_of(amount: float | int, total: int) -> int:
    """An amount of a stage as steps: an integer counts them, a float is their share, rounded."""
    return amount if isinstance(amount, int) else round(amount * total)


def schedule(stage: StageSection, total: int) -> Callable[[ArrayLike], Float[Array, ""]]:
    """The learning rate of step i, counted from 0.

    It grows linearly over the w steps of the warmup, (i + 1) / w of the peak, so that no step is without effect. Then,
    with t = (i - w) / (total - w): "cosine" is (1 + cos(pi t)) / 2 of the peak (Loshchilov and Hutter 2017), "constant"
    the peak, and "wsd" the peak until the last d steps, over which it is 1 - sqrt of their part (Haegele et al. 2024).

    Args:
        total: steps of the stage.
    """
    warmup, decay = steps_of(stage.warmup, total), steps_of(stage.decay, total)

    def rate(count: ArrayLike) -> Float[Array, ""]:
        step = jnp.asarray(count, jnp.float32)
        after = jnp.clip((step - warmup) / max(total - warmup, 1), 0.0, 1.0)
        last = jnp.clip((step - (total - decay)) / max(decay, 1), 0.0, 1.0)
        shape = {
            "cosine": 0.5 * (1 + jnp.cos(jnp.pi * after)),
            "constant": jnp.float32(1),
            "wsd": 1 - jnp.sqrt(last),
        }[stage.schedule]
        return stage.learning_rate * jnp.minimum((step + 1) / max(warmup, 1), 1.0) * shape

    return rate


def optimizer(stage: StageSection, total: int) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter 2019) after clipping by global norm; only matrices decay, no norm and no bias."""
    first, second = stage.betas
    adamw = optax.adamw(
        schedule(stage, total), first, second, weight_decay=stage.weight_decay, mask=_matrices, mu_dtype=jnp.float32
    )
    return adamw if stage.clip is None else optax.chain(optax.clip_by_global_norm(stage.clip), adamw)


def place_state(state: Any, axes: Mapping[str, tuple[str | None, ...]], placement: Placement) -> Any:
    """An optimizer's state on the mesh: whatever in it has an entry for every parameter lies as the parameters do."""

    def mirrors(node: Any) -> bool:
        return isinstance(node, dict) and bool(node) and node.keys() <= axes.keys()

    def put(node: Any) -> Any:
        if mirrors(node):
            return {name: placement.put(array, axes[name]) for name, array in node.items()}
        return placement.put(node, ())

    return jax.tree.map(put, state, is_leaf=mirrors)


def _matrices(parameters: Mapping[str, Array]) -> dict[str, bool]:
    # By name, since a bias of fused projections has as many axes as a matrix.
    return {name: name.endswith((".kernel", ".table")) for name in parameters}
