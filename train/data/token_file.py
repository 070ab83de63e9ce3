"""Pre-tokenised text: a run of ids in a .npy or .bin file, mapped, cut into documents where one ends."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Integer

from kvx.errors import BadInput

DTYPES = tuple(map(np.dtype, (np.uint16, np.uint32, np.int32, np.int64)))


class TokenFile(Sequence[np.ndarray]):
    """Token ids as documents that each end with a token of their own.

    Args:
        tokens: of all documents, one after the other.
        end: the token that ends each; None: it is one document.
    """

    def __init__(self, tokens: Integer[np.ndarray, "N"], end: int | None):
        self._tokens = tokens
        found = np.zeros(0, np.int64) if end is None else np.flatnonzero(tokens == end) + 1
        # What follows the last end is a document too, cut short.
        cut = len(tokens) > (found[-1] if len(found) else 0)
        self._ends = np.append(found, len(tokens)) if cut else found

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Integer[np.ndarray, "N"]:
        start = self._ends[index - 1] if index else 0
        return np.asarray(self._tokens[start : self._ends[index]])


def map_tokens(path: Path, dtype: str) -> Integer[np.ndarray, "N"]:
    """The ids of a file, not read before they are needed.

    Args:
        path: .npy, of uint16, uint32, int32 or int64; or .bin, ids in the machine's byte order and nothing else.
        dtype: of a .bin file.

    Raises:
        BadInput: a file that is damaged, or holds something else.
    """
    try:
        tokens = np.load(path, mmap_mode="r") if path.suffix.lower() == ".npy" else _raw(path, np.dtype(dtype))
    except (OSError, ValueError, EOFError) as error:
        raise BadInput(f"{path} cannot be read as token ids: {str(error).splitlines()[0]}") from None
    if tokens.ndim != 1 or tokens.dtype not in DTYPES:
        raise BadInput(
            f"{path} is of shape {tokens.shape} and dtype {tokens.dtype}; allowed: one row of uint16s or uint32s"
        )
    return tokens


def _raw(path: Path, dtype: np.dtype) -> Integer[np.ndarray, "N"]:
    size = path.stat().st_size
    if size % dtype.itemsize:
        raise BadInput(f"{path} has {size} bytes; allowed: a multiple of {dtype.itemsize}, for {dtype}")
    return np.memmap(path, dtype, mode="r") if size else np.zeros(0, dtype)
