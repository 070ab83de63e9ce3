"""The header of a GGUF file (metadata, tensor table), parsed with every count checked against the bytes left.

The `gguf` package's reader believes the counts it finds and can be made to loop or allocate without end by a hostile
file; this one refuses such a file quickly, in bounded memory. Layout: the GGUF specification of the ggml project,
versions 2 and 3, little-endian.
"""

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType

from kvx.errors import BadInput

# Far above any real model (Gemma 3: 262144 tokens, 6 MB of header), low enough that the worst file costs seconds.
MAX_HEADER_BYTES = 128 << 20
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 16
MAX_STRINGS = 1 << 22  # over all string arrays together
MAX_NAME_BYTES = 1 << 16  # the specification's bound on a key
MAX_TEXT_BYTES = 1 << 24  # one string value: a chat template, a licence
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 1 << 16

_SCALARS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies.

    Attributes:
        name: in ggml's naming ("blk.0.attn_q.weight").
        type: its ggml type.
        shape: in numpy's order, rows first (the file stores the fastest dimension first).
        offset: from the start of the file, in bytes.
        nbytes: its length in the file.
    """

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """A parsed header: metadata (scalars; arrays of numbers as numpy, of strings as lists) and tensors by name."""

    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]


def read_header(data: mmap.mmap | bytes, name: str) -> Header:
    """Parse the header of a GGUF file.

    Args:
        data: the whole file. Only the header's bytes are touched.
        name: the file's name, for the sentence of a refusal.

    Raises:
        BadInput: not a little-endian GGUF of version 2 or 3; a count, length, offset or size that does not fit in the
            file; nested arrays; unknown types; a repeated key or tensor name; overlapping tensors.
    """
    return _Parser(data, name).header()


class _Parser:
    """A cursor over the file that cannot leave it."""

    def __init__(self, data: mmap.mmap | bytes, name: str):
        self.data = data
        self.name = name
        self.end = min(len(data), MAX_HEADER_BYTES)
        self.at = 0
        self.strings_left = MAX_STRINGS

    def refuse(self, sentence: str) -> BadInput:
        return BadInput(f"GGUF file {self.name!r}: {sentence}")

    def need(self, count: int, what: str) -> None:
        """Refuse unless `count` bytes are left."""
        if count > self.end - self.at:
            room = "the header may hold" if len(self.data) > MAX_HEADER_BYTES else "the file has"
            raise self.refuse(f"{what} at byte {self.at} needs {count} bytes, {room} {self.end - self.at} more")

    def number(self, layout: str, what: str) -> Any:
        self.need(struct.calcsize(layout), what)
        (value,) = struct.unpack_from(layout, self.data, self.at)
        self.at += struct.calcsize(layout)
        return value

    def count(self, layout: str, what: str, low: int, high: int) -> int:
        value = self.number(layout, what)
        if not low <= value <= high:
            raise self.refuse(f"{what} is {value}, allowed are {low} to {high}")
        return value

    def text(self, what: str, longest: int) -> str:
        length = self.count("<Q", f"the length of {what}", 0, longest)
        self.need(length, what)
        start, self.at = self.at, self.at + length
        try:
            return self.data[start : self.at].decode("utf-8")
        except UnicodeDecodeError:
            raise self.refuse(f"{what} at byte {start} is not UTF-8") from None

    def value_type(self, what: str) -> GGUFValueType:
        code = self.number("<I", f"the type of {what}")
        try:
            return GGUFValueType(code)
        except ValueError:
            raise self.refuse(f"{what} has value type {code}, known are 0 to {max(GGUFValueType)}") from None

    def value(self, kind: GGUFValueType, what: str) -> Any:
        if kind == GGUFValueType.STRING:
            return self.text(what, MAX_TEXT_BYTES)
        if kind == GGUFValueType.BOOL:
            return bool(self.count("<B", what, 0, 1))
        if kind == GGUFValueType.ARRAY:
            return self.array(what)
        return self.number(_SCALARS[kind], what)

    def array(self, what: str) -> Any:
        kind = self.value_type(what)
        if kind == GGUFValueType.ARRAY:
            raise self.refuse(f"{what} is an array of arrays, allowed are arrays of numbers and strings")
        count = self.number("<Q", f"the length of {what}")
        if kind == GGUFValueType.STRING:
            return self.texts(count, what)
        layout = np.dtype(np.uint8 if kind == GGUFValueType.BOOL else _SCALARS[kind])
        self.need(count * layout.itemsize, what)
        values = np.frombuffer(self.data, layout, count, self.at).copy()
        self.at += values.nbytes
        if kind == GGUFValueType.BOOL:
            if values.size and values.max() > 1:
                raise self.refuse(f"{what} holds a truth value above 1")
            return values.astype(np.bool_)
        return values

    def texts(self, count: int, what: str) -> list[str]:
        """A string array in one pass: the tokens and merges of a vocabulary, hundreds of thousands of them."""
        self.need(8 * count, what)
        if count > self.strings_left:
            raise self.refuse(f"{what} has {count} strings, allowed are {self.strings_left} more")
        self.strings_left -= count
        data, at, end = self.data, self.at, self.end
        length_of = struct.Struct("<Q").unpack_from
        values = []
        try:
            for _ in range(count):
                start = at + 8
                at = start + length_of(data, at)[0]
                if at > end:
                    raise self.refuse(f"string {len(values)} of {what} at byte {start} goes beyond the end")
                values.append(data[start:at].decode("utf-8"))
        except struct.error:
            raise self.refuse(f"{what} goes beyond the end of the file") from None
        except UnicodeDecodeError:
            raise self.refuse(f"string {len(values)} of {what} is not UTF-8") from None
        self.at = at
        return values

    def header(self) -> Header:
        self.need(4, "the magic number")
        if self.data[:4] != b"GGUF":
            raise self.refuse(f"it starts with {bytes(self.data[:4])!r}, a GGUF file starts with b'GGUF'")
        self.at = 4
        version = self.number("<I", "the version")
        if version & 0xFFFF == 0 and version:
            raise self.refuse("it is big-endian, only little-endian files are read")
        if version not in (2, 3):
            raise self.refuse(f"version is {version}, allowed are 2 and 3")
        tensors = self.count("<Q", "the number of tensors", 0, MAX_TENSORS)
        keys = self.count("<Q", "the number of metadata keys", 0, MAX_KEYS)
        metadata = self.metadata(keys)
        return Header(metadata, self.tensors(tensors, self.alignment(metadata)))

    def metadata(self, count: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for index in range(count):
            key = self.text(f"metadata key {index}", MAX_NAME_BYTES)
            if key in metadata:
                raise self.refuse(f"metadata key {key[:80]!r} is there twice")
            what = f"metadata {key[:80]!r}"
            metadata[key] = self.value(self.value_type(what), what)
        return metadata

    def alignment(self, metadata: dict[str, Any]) -> int:
        value = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
        if not isinstance(value, int) or not 8 <= value <= MAX_ALIGNMENT or value & (value - 1):
            raise self.refuse(f"general.alignment is {value!r}, allowed are powers of two from 8 to {MAX_ALIGNMENT}")
        return value

    def tensors(self, count: int, alignment: int) -> dict[str, TensorInfo]:
        infos: dict[str, TensorInfo] = {}
        for index in range(count):
            info = self.tensor(index)
            if info.name in infos:
                raise self.refuse(f"tensor {info.name[:80]!r} is there twice")
            if info.offset % alignment:
                raise self.refuse(f"tensor {info.name[:80]!r} has offset {info.offset}, not a multiple of {alignment}")
            infos[info.name] = info
        start = -(-self.at // alignment) * alignment
        placed = {name: _moved(info, start) for name, info in infos.items()}
        self.check_extents(placed)
        return placed

    def tensor(self, index: int) -> TensorInfo:
        name = self.text(f"the name of tensor {index}", MAX_NAME_BYTES)
        what = f"tensor {name[:80]!r}"
        dimensions = self.count("<I", f"the number of dimensions of {what}", 1, MAX_DIMENSIONS)
        # One dimension can be no larger than the elements a file of this size can hold (never 2 bits or less each).
        most = 8 * len(self.data)
        shape = tuple(self.count("<Q", f"a dimension of {what}", 1, most) for _ in range(dimensions))
        code = self.number("<I", f"the type of {what}")
        try:
            kind = GGMLQuantizationType(code)
        except ValueError:
            raise self.refuse(f"{what} has the unknown ggml type {code}") from None
        block, size = GGML_QUANT_SIZES[kind]
        if shape[0] % block:
            raise self.refuse(f"{what} has rows of {shape[0]} elements, {kind.name} needs a multiple of {block}")
        elements = 1
        for extent in shape:
            elements *= extent
        offset = self.number("<Q", f"the offset of {what}")
        return TensorInfo(name, kind, shape[::-1], offset, elements // block * size)

    def check_extents(self, infos: dict[str, TensorInfo]) -> None:
        before = None
        for info in sorted(infos.values(), key=lambda info: info.offset):
            if info.offset + info.nbytes > len(self.data):
                raise self.refuse(
                    f"tensor {info.name[:80]!r} ends at byte {info.offset + info.nbytes}, "
                    f"the file has {len(self.data)}: it is truncated or corrupt"
                )
            if before is not None and info.offset < before.offset + before.nbytes:
                raise self.refuse(f"tensors {before.name[:80]!r} and {info.name[:80]!r} overlap")
            before = info


def _moved(info: TensorInfo, start: int) -> TensorInfo:
    return TensorInfo(info.name, info.type, info.shape, info.offset + start, info.nbytes)
