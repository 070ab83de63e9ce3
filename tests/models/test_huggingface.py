"""A Hugging Face directory is read lazily and checked; a written one is read back equal, or leaves nothing."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvx.errors import BadInput
from kvx.models.readers import huggingface, read_checkpoint, read_huggingface, write_checkpoint
from kvx.models.readers.safetensors import SafetensorsFile

CONFIG = {"model_type": "llama", "hidden_size": 4, "max_position_embeddings": 64, "eos_token_id": 2}
TENSORS = {
    "a.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b.weight": np.arange(6, dtype=np.float16).reshape(2, 3),
    "c.weight": np.arange(5).astype(ml_dtypes.bfloat16),
    "scalar": np.array(2.5, np.float32),
    "empty": np.zeros((0, 3), np.float32),
}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": "{{ messages }}", "eos_token_ids": [2, 7]}
SPECIFICATION = {"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}


def assert_equal(found, expected):
    assert sorted(found) == sorted(expected) and len(found) == len(expected)
    for name, tensor in expected.items():
        assert found.shape(name) == tensor.shape and found[name].dtype == tensor.dtype
        np.testing.assert_array_equal(found[name], tensor)


def saved(path: Path, **changed) -> Path:
    values = {"config": CONFIG, "tensors": TENSORS, "tokenizer": SPECIFICATION, "special": SPECIAL} | changed
    write_checkpoint(path, **values)
    return path


def test_what_was_written_is_read_back(tmp_path):
    checkpoint = read_checkpoint(saved(tmp_path / "new" / "model"))
    assert_equal(checkpoint.tensors, TENSORS)
    assert checkpoint.config == CONFIG
    assert checkpoint.tokenizer == SPECIFICATION and checkpoint.special == SPECIAL
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model"]
    assert (tmp_path / "new" / "model").stat().st_mode & 0o700 == 0o700


def test_the_dtype_is_named_when_it_is_one(tmp_path):
    checkpoint = read_checkpoint(saved(tmp_path / "m", tensors={"c": TENSORS["c.weight"]}))
    assert checkpoint.config["torch_dtype"] == "bfloat16"


def test_a_checkpoint_can_be_written_from_a_checkpoint(tmp_path):
    first = read_checkpoint(saved(tmp_path / "a"))
    second = read_checkpoint(saved(tmp_path / "b", tensors=first.tensors))
    assert_equal(second.tensors, TENSORS)


def test_weights_above_the_bound_are_sharded_with_an_index(tmp_path):
    path = saved(tmp_path / "m", shard_bytes=50)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert shards == [f"model-{part:05d}-of-00002.safetensors" for part in (1, 2)]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())
    assert_equal(read_checkpoint(path).tensors, TENSORS)


def test_the_safetensors_package_reads_what_we_write(tmp_path):
    path = saved(tmp_path / "m", tensors={name: TENSORS[name] for name in ("a.weight", "b.weight", "empty")})
    with safetensors.safe_open(path / "model.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
        for name in ("a.weight", "b.weight", "empty"):
            np.testing.assert_array_equal(file.get_tensor(name), TENSORS[name])


def test_we_read_what_the_safetensors_package_writes(tmp_path):
    expected = {name: TENSORS[name] for name in ("a.weight", "b.weight", "scalar")}
    safetensors.numpy.save_file(expected, tmp_path / "x.safetensors", metadata={"k": "v"})
    assert_equal(SafetensorsFile(tmp_path / "x.safetensors"), expected)


def test_rope_factors_are_written_as_a_scaling_that_others_know(tmp_path):
    config = CONFIG | {"rope_theta": 1e4, "rope_factors": [1.0, 8.0]}
    written = read_checkpoint(saved(tmp_path / "m", config=config)).config
    assert "rope_factors" not in written and written["rope_scaling"]["long_factor"] == [1.0, 8.0]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("x")])
def test_a_failed_write_leaves_nothing(error, tmp_path):
    class Failing(dict):
        def __getitem__(self, name):
            if name == "b.weight" and "a.weight" in taken:
                raise error
            taken.append(name)
            return super().__getitem__(name)

        def shape(self, name):
            return TENSORS[name].shape

    taken = []
    tensors = Failing(TENSORS)
    with pytest.raises(BadInput if isinstance(error, OSError) else type(error)):
        saved(tmp_path / "m", tensors=tensors)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_target_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    saved(tmp_path / "empty")
    with pytest.raises(BadInput, match="which exists"):
        saved(tmp_path / "empty")
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="which exists"):
        saved(tmp_path / "file")
    with pytest.raises(BadInput, match="cannot be written"):
        saved(tmp_path / "file" / "below")


def test_a_dtype_without_a_safetensors_name_is_refused(tmp_path):
    with pytest.raises(BadInput, match="dtype complex64"):
        saved(tmp_path / "m", tensors={"x": np.zeros(2, np.complex64)})
    assert list(tmp_path.iterdir()) == []


def test_every_truncation_of_the_weights_is_refused(tmp_path):
    whole = (saved(tmp_path / "m") / "model.safetensors").read_bytes()
    cut = tmp_path / "cut.safetensors"
    for length in range(len(whole)):
        cut.write_bytes(whole[:length])
        with pytest.raises(BadInput, match=r"cut\.safetensors"):
            SafetensorsFile(cut)


def made(path: Path, table: object, data: bytes = b"") -> Path:
    header = table if isinstance(table, bytes) else json.dumps(table).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


def entry(shape=(2,), begin=0, end=8, dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("table", "data", "reason"),
    [
        ([], b"", "not a JSON object"),
        (b"{", b"", "not JSON"),
        (b"[" * 100_000, b"", "not JSON"),
        ({"x": 1}, b"", "not described"),
        ({"x": entry(dtype="Q9")}, bytes(8), "dtype Q9, supported are"),
        ({"x": entry(dtype=["F32"])}, bytes(8), "supported are"),
        ({"x": entry(shape=(-2,))}, bytes(8), "non-negative"),
        ({"x": entry(shape=(2.0,))}, bytes(8), "non-negative"),
        ({"x": entry(shape=(3,))}, bytes(8), "does not fit"),
        ({"x": entry(shape=(2**62, 4))}, bytes(8), "does not fit"),
        ({"x": entry(begin=8, end=0)}, bytes(8), "does not fit"),
        ({"x": entry(begin=4, end=12)}, bytes(12), "hole or overlap"),
        ({"x": entry(), "y": entry()}, bytes(8), "hole or overlap"),
        ({"x": entry()}, bytes(9), "truncated or corrupt"),
        ({"x": entry(end=1 << 60, shape=(1 << 58,))}, bytes(8), "does not fit"),
    ],
)
def test_a_fault_of_the_weights_is_named(table, data, reason, tmp_path):
    with pytest.raises(BadInput, match=reason) as refusal:
        SafetensorsFile(made(tmp_path / "bad.safetensors", table, data))
    assert "\n" not in str(refusal.value)


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_changed_bytes_are_refused_or_read(data, tmp_path):
    whole = bytearray(made(tmp_path / "x", {"x": entry(), "y": entry((1, 2), 8, 16)}, bytes(16)).read_bytes())
    for at, value in data.draw(st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), max_size=4)):
        whole[at] = value
    (tmp_path / "changed").write_bytes(whole)
    try:
        file = SafetensorsFile(tmp_path / "changed")
        assert all(file[name].shape == file.shape(name) for name in file)
    except BadInput as refusal:
        assert "\n" not in str(refusal)


def broken(path: Path, fault: str) -> Path:
    path = saved(path, shard_bytes=50)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    if fault == "config":
        (path / "config.json").unlink()
    elif fault == "list":
        (path / "config.json").write_text("[1]")
    elif fault == "cut":
        (path / "config.json").write_text('{"model_type"')
    elif fault == "bytes":
        (path / "config.json").write_bytes(b"\xff\xfe")
    elif fault == "shard":
        (path / shards[1]).unlink()
    elif fault == "outside":
        index["weight_map"]["a.weight"] = "../other.safetensors"
    elif fault == "map":
        index["weight_map"] = []
    elif fault == "moved":
        index["weight_map"]["a.weight"] = shards[1]
    elif fault == "unlisted":
        del index["weight_map"]["b.weight"]
    elif fault in ("index", "pickled"):
        (path / "model.safetensors.index.json").unlink()
    elif fault == "eos":
        (path / "generation_config.json").write_text('{"eos_token_id": "x"}')
    if fault == "pickled":
        (path / "pytorch_model.bin").touch()
    if (path / "model.safetensors.index.json").exists():
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("config", "has no config.json"),
        ("list", "config.json in .* is not a JSON object"),
        ("cut", "config.json in .* is not JSON"),
        ("bytes", "config.json in .* is not UTF-8"),
        ("shard", "which is not in"),
        ("outside", "'../other.safetensors', allowed are plain names"),
        ("map", "has no weight_map"),
        ("moved", "where it is not"),
        ("unlisted", "does not place there"),
        ("index", "neither model.safetensors nor"),
        ("pickled", "pickled weights are never read"),
        ("eos", "eos_token_id"),
    ],
)
def test_a_fault_of_the_directory_is_named(fault, reason, tmp_path):
    with pytest.raises(BadInput, match=reason):
        read_huggingface(broken(tmp_path / "m", fault))


def test_a_file_above_its_size_limit_is_refused(tmp_path, monkeypatch):
    path = saved(tmp_path / "m")
    monkeypatch.setitem(huggingface.SIZE_LIMITS, "tokenizer.json", 10)
    with pytest.raises(BadInput, match=r"tokenizer.json .* bytes, allowed are 10"):
        read_huggingface(path)


def test_neither_directory_nor_gguf_is_refused(tmp_path):
    for path in (tmp_path / "none", tmp_path / "x.bin"):
        with pytest.raises(BadInput, match="allowed are a directory"):
            read_checkpoint(path)
    with pytest.raises(BadInput, match="allowed is a directory"):
        read_huggingface(tmp_path / "none")


def test_special_tokens_are_found_wherever_they_are_kept(tmp_path):
    path = saved(tmp_path / "m")
    (path / "generation_config.json").unlink()
    (path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "bos_token": {"content": "<b>", "lstrip": False},
                "eos_token": None,
                "add_bos_token": True,
                "chat_template": [{"name": "tool", "template": "T"}, {"name": "default", "template": "D"}],
            }
        )
    )
    (path / "special_tokens_map.json").write_text('{"bos_token": "<x>", "eos_token": "<e>"}')
    special = read_huggingface(path).special
    assert special == {
        "bos_token": "<b>",
        "eos_token": "<e>",
        "add_bos_token": True,
        "chat_template": "D",
        "eos_token_ids": [2],  # of config.json
    }
    (path / "chat_template.jinja").write_text("J")
    assert read_huggingface(path).special["chat_template"] == "J"


def test_a_directory_without_tokenizer_is_read(tmp_path):
    assert read_huggingface(saved(tmp_path / "m", tokenizer=None)).tokenizer is None
