"""Where each tensor of a Hugging Face checkpoint lives inside a model's parameters.

A model lists its pieces once; reading, writing and checking a checkpoint all walk that list.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from flax import nnx


@dataclass(frozen=True)
class Piece:
    """One tensor of a checkpoint: `parameter[index]`, up to its layout.

    Attributes:
        name: the tensor's Hugging Face name.
        parameter: the parameter that holds it, perhaps beside other pieces (queries, keys and values share one).
        layout: "matrix": (out, in) in the file, (in, *out) here; "vector": one axis in the file, any number here;
            "table": the same in both.
        index: where in the parameter; the whole of it by default.
    """

    name: str
    parameter: nnx.Param
    layout: Literal["matrix", "vector", "table"]
    index: Any = ...

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape in the file."""
        inside = self._inside()
        if self.layout == "matrix":
            return math.prod(inside[1:]), inside[0]
        return inside if self.layout == "table" else (math.prod(inside),)

    def write(self, tensor: np.ndarray, into: np.ndarray) -> None:
        """Copy the file's tensor into its place in the parameter's array `into`."""
        into[self.index] = (tensor.T if self.layout == "matrix" else tensor).reshape(self._inside())

    def read(self, array: np.ndarray) -> np.ndarray:
        """The file's tensor out of the parameter's array."""
        piece = array[self.index]
        if self.layout == "matrix":
            piece = piece.reshape(piece.shape[0], -1).T
        return np.ascontiguousarray(piece).reshape(self.shape)

    def _inside(self) -> tuple[int, ...]:
        # A broadcast scalar takes any shape without memory, and numpy itself says what the index selects.
        return np.broadcast_to(np.False_, self.parameter.shape)[self.index].shape


def qkv_pieces(prefix: str, kernel: nnx.Param, layout: Literal["matrix", "vector"], suffix: str) -> Iterator[Piece]:
    """The three pieces of a fused (..., G, R + 2, D) projection: R query heads, a key and a value per KV head."""
    yield Piece(f"{prefix}.q_proj.{suffix}", kernel, layout, np.s_[..., :-2, :])
    yield Piece(f"{prefix}.k_proj.{suffix}", kernel, layout, np.s_[..., -2, :])
    yield Piece(f"{prefix}.v_proj.{suffix}", kernel, layout, np.s_[..., -1, :])


def gated_pieces(prefix: str, kernel: nnx.Param, layout: Literal["matrix", "vector"], suffix: str) -> Iterator[Piece]:
    """The two pieces of a fused (..., 2, F) gate and up projection."""
    yield Piece(f"{prefix}.gate_proj.{suffix}", kernel, layout, np.s_[..., 0, :])
    yield Piece(f"{prefix}.up_proj.{suffix}", kernel, layout, np.s_[..., 1, :])
