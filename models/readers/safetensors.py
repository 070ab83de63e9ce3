"""One safetensors file: its header checked against the file, its tensors mapped and read one at a time.

The format: eight bytes of header length (little-endian), that many bytes of JSON (name -> dtype, shape, offsets), then
the data without holes.
"""

import json
import math
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

import ml_dtypes
import numpy as np

from kvx.errors import BadInput

MAX_HEADER_BYTES = 100_000_000  # the format's own bound
_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class SafetensorsFile:
    """The tensors of one file, read-only views of its mapping.

    Raises:
        BadInput: when opened: missing, truncated or corrupt, or of a dtype that is not known.
    """

    def __init__(self, path: Path):
        self._name = path.name
        try:
            with open(path, "rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise self._refuse("it is empty") from None
        except OSError as error:
            raise BadInput(f"safetensors file {str(path)!r} cannot be read: {error.strerror}") from None
        self._entries = self._header()

    def __getitem__(self, name: str) -> np.ndarray:
        dtype, shape, start = self._entries[name]
        if hasattr(mmap, "MADV_DONTNEED"):
            # Pages that earlier tensors touched would count as resident beside the model; a view that is still in use
            # reads its pages from the file again.
            self._data.madvise(mmap.MADV_DONTNEED)
        return np.frombuffer(self._data, dtype, math.prod(shape), start).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape, known without reading it."""
        return self._entries[name][1]

    def _refuse(self, sentence: str) -> BadInput:
        return BadInput(f"safetensors file {self._name!r}: {sentence}")

    def _header(self) -> dict[str, tuple[np.dtype, tuple[int, ...], int]]:
        size = len(self._data)
        length = int.from_bytes(self._data[:8], "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise self._refuse(
                f"its header claims {length} bytes, allowed are {max(0, min(size - 8, MAX_HEADER_BYTES))}: "
                "it is truncated or corrupt"
            )
        try:
            table = json.loads(self._data[8 : 8 + length])
        except (ValueError, RecursionError):
            raise self._refuse("its header is not JSON") from None
        if not isinstance(table, dict):
            raise self._refuse("its header is not a JSON object")
        table.pop("__metadata__", None)
        entries, spans = {}, []
        for name, entry in table.items():
            dtype, shape, (begin, end) = self._entry(name, entry)
            entries[name] = (dtype, shape, 8 + length + begin)
            spans.append((begin, end))
        at = 0
        for begin, end in sorted(spans):
            if begin != at:
                raise self._refuse(f"its tensors leave a hole or overlap at byte {at} of the data")
            at = end
        if at != size - 8 - length:
            raise self._refuse(f"its tensors take {at} bytes, the file has {size - 8 - length}: truncated or corrupt")
        return entries

    def _entry(self, name: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], tuple[int, int]]:
        what = f"tensor {name[:80]!r}"
        if not isinstance(entry, dict):
            raise self._refuse(f"{what} is not described by a JSON object")
        dtype = entry.get("dtype")
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise self._refuse(f"{what} is of dtype {str(dtype)[:40]}, supported are {', '.join(_DTYPES)}")
        shape, offsets = entry.get("shape"), entry.get("data_offsets")
        if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2 or len(shape) > 32:
            raise self._refuse(f"{what} has a shape or offsets that are not lists of non-negative integers")
        # Python's integers do not wrap, so a product of huge extents cannot pass for a small one.
        if offsets[1] - offsets[0] != math.prod(shape) * _DTYPES[dtype].itemsize or offsets[1] > len(self._data):
            raise self._refuse(f"{what} of shape {str(shape)[:80]} does not fit its {offsets[1] - offsets[0]} bytes")
        return _DTYPES[dtype], tuple(shape), (offsets[0], offsets[1])


class SafetensorsWriter:
    """Writes tensors one at a time, so that a model larger than memory can be saved.

    The header precedes the data in the file but is known only at the end: room for it is kept at the start and what it
    does not need is padded with blanks, as the format allows.
    """

    def __init__(self, file: BinaryIO, shapes: dict[str, tuple[int, ...]]):
        longest = {name: _described("F8_E4M3", shape, 10**16, 10**16) for name, shape in shapes.items()}
        room = len(json.dumps({"__metadata__": {"format": "pt"}, **longest})) + 8
        self._room = -(-room // 8) * 8
        self._file = file
        self._table: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for this mark
        self._at = 0
        file.seek(8 + self._room)

    @property
    def nbytes(self) -> int:
        """Bytes of data so far."""
        return self._at

    def write(self, name: str, array: np.ndarray) -> None:
        """Append a tensor; BadInput for a dtype that the format does not have."""
        if array.dtype not in _NAMES:
            raise BadInput(f"tensor {name!r} is of dtype {array.dtype}, supported are {', '.join(map(str, _NAMES))}")
        self._file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        end = self._at + array.nbytes
        self._table[name] = _described(_NAMES[array.dtype], array.shape, self._at, end)
        self._at = end

    def finish(self) -> None:
        """Write the header."""
        header = json.dumps(self._table).encode().ljust(self._room)
        self._file.seek(0)
        self._file.write(len(header).to_bytes(8, "little") + header)


def _described(dtype: str, shape: tuple[int, ...], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def _naturals(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)
