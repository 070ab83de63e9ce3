"""What every operation asks before any work: shapes that fit together, masks, what kernels need of dtypes and JAX."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Shaped


def check_shape(name: str, array: Shaped[Array, "..."] | None, *allowed: tuple[int | None, ...]) -> None:
    """ValueError unless the array has one of these shapes, in which None is any size; an array that is None passes."""
    if array is None or any(_fits(array.shape, shape) for shape in allowed):
        return
    shapes = " and ".join(f"({', '.join('any' if size is None else str(size) for size in each)})" for each in allowed)
    raise ValueError(f"{name} has shape {array.shape}, allowed {'are' if len(allowed) > 1 else 'is'} {shapes}")


def check_masking(window: int | None, softcap: float | None) -> None:
    """ValueError for a window that shows nothing, or a cap that is none."""
    if window is not None and window < 1:
        raise ValueError(f"window is {window}, allowed are None and integers from 1 up")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap is {softcap}, allowed are None and numbers above 0")


def dtype_refusal(
    dtypes: Mapping[str, DTypeLike], allowed: tuple[DTypeLike, ...] = (jnp.bfloat16, jnp.float32)
) -> str | None:
    """Why a kernel cannot take arrays of these dtypes by name; None if it can."""
    taken = [jnp.dtype(each) for each in allowed]
    for name, dtype in dtypes.items():
        if jnp.dtype(dtype) not in taken:
            return f"{name} has dtype {jnp.dtype(dtype)}, it takes {' and '.join(each.name for each in taken)}"
    return None


def triton_refusal(interpreted: bool = False) -> str | None:
    """Why this JAX cannot run or lower kernels in Pallas-Triton; None if it can, or if they are interpreted."""
    if jax.__version_info__ < (0, 11) and not interpreted:
        return f"jax is {jax.__version__}, Triton kernels need 0.11 or later"
    return None


def _fits(shape: tuple[int, ...], allowed: tuple[int | None, ...]) -> bool:
    return len(shape) == len(allowed) and all(size in (None, found) for size, found in zip(allowed, shape, strict=True))
