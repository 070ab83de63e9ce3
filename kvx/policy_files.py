"""Saving and loading a policy: one safetensors file with its text as metadata and its learned arrays as tensors."""

import json
from os import PathLike
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Array

from kvx.destinations import replace_file
from kvx.errors import BadInput
from kvx.inputs import checked_policy
from kvx.policy import Policy
from kvx.policy_text import parse_policy

LARGEST_HEADER = 1_000_000
"""Bytes of header: arrays of a policy are few, so a larger one is not a policy's."""

_FORMAT = "kvx policy 1"


def save_policy(policy: Policy, path: str | PathLike[str]) -> None:
    """Write a policy to one file, under its name complete or not at all.

    Args:
        policy: its text must read back (`kvx.parse_policy`), as that of every named method and chain does.
        path: an existing file is replaced.

    Raises:
        BadInput: a policy that text cannot describe, or a path that cannot be written.
    """
    policy = checked_policy(policy)
    path = Path(path)
    arrays = _arrays(policy)
    if _slots(parse_policy(policy.text)) != _slots(policy):
        raise BadInput(f"policy {policy.text!r} holds more than its text says; allowed: named methods and their chains")
    try:
        replace_file(path, safetensors.numpy.save(arrays, {"format": _FORMAT, "policy": policy.text}))
    except OSError as error:
        raise BadInput(f"path is {str(path)!r}, which cannot be written: {error.strerror or error}") from None


def load_policy(path: str | PathLike[str]) -> Policy:
    """A policy with its learned arrays, as `save_policy` wrote it.

    Whether the arrays fit a model is checked when the policy is used.

    Raises:
        BadInput: a missing, truncated or corrupt file, one that holds no policy, or arrays that the policy does not
            have, or lacks, or that are not finite.
    """
    path = Path(path)
    _check_header(path)
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, TypeError, ValueError) as error:
        raise _refuse(path, str(error).splitlines()[0]) from None
    if metadata.get("format") != _FORMAT or "policy" not in metadata:
        raise _refuse(path, f"its metadata is not that of {_FORMAT!r}")
    policy = parse_policy(metadata["policy"])
    return _filled(policy, arrays, path)


def _slots(policy: Policy) -> dict[str, object]:
    """Every place of a policy that an array may take, by path; None where none is yet."""
    leaves = jax.tree_util.tree_flatten_with_path(policy, is_leaf=lambda leaf: leaf is None)[0]
    return {jax.tree_util.keystr(place, simple=True, separator="/"): None for place, _ in leaves}


def _arrays(policy: Policy) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_flatten_with_path(policy)[0]
    return {
        jax.tree_util.keystr(place, simple=True, separator="/"): np.ascontiguousarray(leaf) for place, leaf in leaves
    }


def _filled(policy: Policy, arrays: dict[str, np.ndarray], path: Path) -> Policy:
    leaves, structure = jax.tree.flatten(policy, is_leaf=lambda leaf: leaf is None)
    places = list(_slots(policy))
    if extra := sorted(set(arrays) - set(places)):
        raise _refuse(path, f"it has an array {extra[0][:80]!r} that {policy.text!r} does not have")
    for name, array in arrays.items():
        # A policy's numbers enter scores: one NaN would silently rule every ranking.
        if np.issubdtype(array.dtype, np.floating) and not np.all(np.isfinite(array)):
            raise _refuse(path, f"its array {name!r} holds values that are not finite")
    filled: list[Array | None] = []
    for name, built in zip(places, leaves, strict=True):
        if name not in arrays and built is not None:
            raise _refuse(path, f"it lacks the array {name!r} of {policy.text!r}")
        array = arrays.get(name)
        if built is not None and array is not None and (built.shape, built.dtype) != (array.shape, array.dtype):
            raise _refuse(
                path, f"its array {name!r} is {array.dtype}{list(array.shape)}, not {built.dtype}{list(built.shape)}"
            )
        filled.append(None if array is None else jnp.asarray(array))
    return jax.tree.unflatten(structure, filled)


def _check_header(path: Path) -> None:
    """Read the header's claims before anything is allocated by them."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, LARGEST_HEADER):
                raise _refuse(path, f"its header claims {length} bytes of {size}: truncated, or not a policy's file")
            json.loads(file.read(length))
    except OSError as error:
        raise BadInput(f"path is {str(path)!r}, which cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, BadInput):
            raise
        raise _refuse(path, "its header is not JSON") from None


def _refuse(path: Path, sentence: str) -> BadInput:
    return BadInput(f"policy file {path.name!r}: {sentence}; allowed: a file that kvx.save_policy wrote")
