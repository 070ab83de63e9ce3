"""The GGUF header parser reads what the gguf package writes, and refuses hostile files in bounded time and memory."""

import functools
import mmap
import struct
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from kvx.errors import BadInput
from kvx.models import zoo
from kvx.models.readers import gguf_header
from kvx.models.readers.gguf_header import Header, read_header

VALUES = {
    "t.u8": 200,
    "t.i16": -300,
    "t.u32": 70_000,
    "t.f32": 0.5,
    "t.u64": 1 << 40,
    "t.f64": 0.1,
    "t.yes": True,
    "t.text": "héllo ☃",
    "t.words": ["a", "", "ünïcode", "🙂"],
    "t.ints": [1, -2, 3],
    "t.floats": [0.5, -1.5],
}


@functools.cache
def small_file() -> bytes:
    """A file with every kind of value and two tensors."""
    with tempfile.TemporaryDirectory() as folder:
        writer = GGUFWriter(Path(folder) / "small.gguf", "llama")
        writer.add_uint8("t.u8", 200)
        writer.add_int16("t.i16", -300)
        writer.add_uint32("t.u32", 70_000)
        writer.add_float32("t.f32", 0.5)
        writer.add_uint64("t.u64", 1 << 40)
        writer.add_float64("t.f64", 0.1)
        writer.add_bool("t.yes", True)
        writer.add_string("t.text", VALUES["t.text"])
        for key in ("t.words", "t.ints", "t.floats"):
            writer.add_array(key, VALUES[key])
        writer.add_tensor("a", np.arange(16, dtype=np.float32).reshape(2, 8))
        writer.add_tensor("b", np.zeros((3, 34), np.uint8), raw_dtype=GGMLQuantizationType.Q8_0)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return (Path(folder) / "small.gguf").read_bytes()


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def made(keys: list[bytes] = (), tensors: list[bytes] = (), data: int = 0, version: int = 3) -> bytes:
    """A file of raw entries, its data `data` bytes long from the next multiple of 32."""
    body = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(keys)) + b"".join([*keys, *tensors])
    return body + bytes(-len(body) % 32 + data) if tensors else body


def tensor(name: bytes, shape: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def number(key: bytes, value: int) -> bytes:
    return text(key) + struct.pack("<II", 4, value)


def test_reads_back_what_the_gguf_package_wrote():
    header = read_header(small_file(), "small.gguf")
    for key, value in VALUES.items():
        found = header.metadata[key]
        assert (found.tolist() if isinstance(found, np.ndarray) else found) == value
    assert header.metadata["general.architecture"] == "llama"
    a, b = header.tensors["a"], header.tensors["b"]
    assert (a.shape, a.type.name, a.nbytes) == ((2, 8), "F32", 64)
    assert (b.shape, b.type.name, b.nbytes) == ((3, 32), "Q8_0", 102)
    assert np.frombuffer(small_file(), np.float32, 16, a.offset).tolist() == list(range(16))


def test_every_truncation_is_refused():
    whole = small_file()
    end = max(info.offset + info.nbytes for info in read_header(whole, "x").tensors.values())
    for length in range(end):
        with pytest.raises(BadInput):
            read_header(whole[:length], "cut.gguf")


@pytest.mark.parametrize("count", [2**64 - 1, 2**63, 2**40, 2**31])
def test_an_absurd_count_anywhere_is_refused_or_harmless(count):
    whole = small_file()
    started = time.perf_counter()
    for at in range(4, len(whole) - 8):
        outcome(whole[:at] + struct.pack("<Q", count) + whole[at + 8 :])
    assert time.perf_counter() - started < 10  # over a thousand files: some milliseconds each even on a busy machine


@given(st.lists(st.tuples(st.integers(0, len(small_file()) - 1), st.integers(0, 255)), min_size=1, max_size=6))
@settings(max_examples=300, deadline=2000)
def test_changed_bytes_are_refused_or_parsed(changes):
    data = bytearray(small_file())
    for at, value in changes:
        data[at] = value
    outcome(bytes(data))


@given(st.binary(max_size=300))
@settings(max_examples=200, deadline=2000)
def test_noise_after_the_magic_is_refused_or_parsed(noise):
    outcome(b"GGUF\x03\0\0\0" + noise)


def outcome(data: bytes) -> Header | None:
    try:
        header = read_header(data, "hostile.gguf")
    except BadInput as refusal:
        assert "\n" not in str(refusal)
        return None
    assert all(info.offset + info.nbytes <= len(data) for info in header.tensors.values())
    return header


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "magic"),
        (b"PK\x03\x04" + bytes(40), "starts with"),
        (made(version=1), "version is 1"),
        (made(version=4), "version is 4"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 50), "metadata keys is"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 50, 0), "tensors is"),
        (made([number(b"k", 1), number(b"k", 2)]), "'k' is there twice"),
        (made([text(b"k") + struct.pack("<I", 99) + bytes(8)]), "value type 99"),
        (made([text(b"k") + struct.pack("<IIQ", 9, 9, 1) + bytes(64)]), "array of arrays"),
        (made([text(b"k") + struct.pack("<IIQ", 9, 8, 1 << 60)]), "needs"),
        (made([text(b"k") + struct.pack("<IIQ", 9, 4, 1 << 62)]), "needs"),
        (made([text(b"k") + struct.pack("<IIQQ", 9, 8, 1, 1 << 40)]), "beyond the end"),
        (made([text(b"k") + struct.pack("<IB", 7, 2)]), "is 2, allowed are 0 to 1"),
        (made([text(b"\xff") + struct.pack("<II", 4, 1)]), "not UTF-8"),
        (made([number(b"general.alignment", 0)], [tensor(b"a")], 32), "alignment is 0"),
        (made([number(b"general.alignment", 48)], [tensor(b"a")], 32), "alignment is 48"),
        (made([], [tensor(b"a"), tensor(b"a", offset=32)], 64), "'a' is there twice"),
        (made([], [tensor(b"a"), tensor(b"b")], 64), "overlap"),
        (made([], [tensor(b"a", offset=4)], 64), "not a multiple of 32"),
        (made([], [tensor(b"a", offset=1 << 62)], 64), "truncated or corrupt"),
        (made([], [tensor(b"a", shape=(1 << 33, 1 << 33))], 64), "a dimension of"),
        (made([], [tensor(b"a", shape=(0,))], 64), "a dimension of"),
        (made([], [tensor(b"a", shape=())], 64), "number of dimensions"),
        (made([], [tensor(b"a", shape=(2, 2, 2, 2, 2))], 64), "number of dimensions"),
        (made([], [tensor(b"a", kind=77)], 64), "unknown ggml type 77"),
        (made([], [tensor(b"a", shape=(33,), kind=8)], 64), "multiple of 32"),
    ],
)
def test_a_fault_is_named(data, reason):
    with pytest.raises(BadInput, match=reason) as refusal:
        read_header(data, "bad.gguf")
    assert "'bad.gguf'" in str(refusal.value) and "\n" not in str(refusal.value)


def test_more_strings_than_any_vocabulary_are_refused_in_bounded_memory():
    count = gguf_header.MAX_STRINGS + 1
    data = made([text(b"k") + struct.pack("<IIQ", 9, 8, count) + bytes(8 * count)])
    tracemalloc.start()
    try:
        with pytest.raises(BadInput, match="strings, allowed are"):
            read_header(data, "many.gguf")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_header_longer_than_the_bound_is_refused(monkeypatch):
    monkeypatch.setattr(gguf_header, "MAX_HEADER_BYTES", 256)
    with pytest.raises(BadInput, match="the header may hold"):
        read_header(small_file(), "long.gguf")


@pytest.mark.weights
def test_the_metadata_of_smollm2_parses_in_half_a_second():
    with open(zoo.fetch("smollm2-135m-instruct"), "rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        header = read_header(data, "smollm2")
        times.append(time.perf_counter() - started)
    assert min(times) < 0.5
    assert len(header.metadata["tokenizer.ggml.tokens"]) == 49152 and len(header.tensors) == 272
