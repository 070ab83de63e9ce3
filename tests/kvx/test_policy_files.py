"""Claims about policy files: what is saved comes back, and what others wrote is refused in one sentence."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

import kvx
from kvx.errors import BadInput
from kvx.policies import full, q_filters, snapkv
from kvx.policy_files import load_policy, save_policy

PLACE = "stages/0/score/directions"
METADATA = {"format": "kvx policy 1", "policy": "q_filters(budget=64)"}


def calibrated(policy, seed=0):
    leaves, structure = jax.tree.flatten(policy, is_leaf=lambda leaf: leaf is None)
    arrays = np.random.default_rng(seed).standard_normal((2, 2, 8)).astype(np.float32)
    return jax.tree.unflatten(structure, [jnp.asarray(arrays) for _ in leaves])


@pytest.mark.parametrize(
    "policy",
    [
        full(),
        snapkv(budget=0.25),
        q_filters(budget=64),
        calibrated(q_filters(budget=96, window=8)),
        kvx.chain(calibrated(q_filters(budget=256, every_step=False)), snapkv(budget=128)),
    ],
    ids=lambda policy: policy.text,
)
def test_saving_and_loading_gives_an_equal_policy(tmp_path, policy):
    save_policy(policy, tmp_path / "policy.safetensors")
    loaded = load_policy(tmp_path / "policy.safetensors")
    assert jax.tree.structure(loaded) == jax.tree.structure(policy) and loaded.text == policy.text
    jax.tree.map(np.testing.assert_array_equal, loaded, policy)
    assert [entry.name for entry in tmp_path.iterdir()] == ["policy.safetensors"]


def test_saving_replaces_a_file_and_leaves_nothing_when_it_cannot(tmp_path):
    path = tmp_path / "policy"
    save_policy(full(), path)
    save_policy(snapkv(budget=128), path)
    assert load_policy(path).text == "snapkv(budget=128)"
    with pytest.raises(BadInput, match="cannot be written"):
        save_policy(full(), tmp_path / "missing" / "policy")
    (tmp_path / "folder").mkdir()
    with pytest.raises(BadInput, match="cannot be written"):
        save_policy(full(), tmp_path / "folder")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["folder", "policy"]


def test_a_policy_that_its_text_does_not_describe_is_refused(tmp_path):
    hand_made = kvx.Policy(q_filters(budget=64).stages, "full")
    with pytest.raises(BadInput, match="more than its text says"):
        save_policy(hand_made, tmp_path / "policy")


@pytest.mark.parametrize(
    ("arrays", "metadata", "words"),
    [
        ({}, {"format": "pt"}, "metadata"),
        ({}, METADATA | {"policy": "q_filtres(budget=64)"}, "did you mean 'q_filters'"),
        ({}, METADATA | {"policy": "x" * 17_000}, "at most 16000"),
        ({"stages/0/other": np.zeros(2, np.float32)}, METADATA, "does not have"),
        ({PLACE: np.full((2, 2, 8), np.nan, np.float32)}, METADATA, "not finite"),
    ],
)
def test_files_of_others_are_refused(tmp_path, arrays, metadata, words):
    path = tmp_path / "policy"
    path.write_bytes(safetensors.numpy.save(arrays, metadata))
    with pytest.raises(BadInput) as error:
        load_policy(path)
    assert words in str(error.value) and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 4,
        (2**62).to_bytes(8, "little") + b"{}",
        (100).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (3).to_bytes(8, "little") + b"{{{",
        (200_000).to_bytes(8, "little") + b"[" * 200_000,
    ],
)
def test_hostile_headers_are_refused(tmp_path, content):
    path = tmp_path / "policy"
    path.write_bytes(content)
    with pytest.raises(BadInput, match="policy file"):
        load_policy(path)


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 399), flip=st.integers(0, 399), value=st.integers(0, 255))
def test_truncated_and_damaged_files_are_refused_or_read_as_a_policy(tmp_path_factory, cut, flip, value):
    folder = tmp_path_factory.mktemp("damaged")
    save_policy(calibrated(q_filters(budget=64)), folder / "whole")
    content = (folder / "whole").read_bytes()
    (folder / "cut").write_bytes(content[: min(cut, len(content) - 1)])
    with pytest.raises(BadInput):
        load_policy(folder / "cut")
    damaged = bytearray(content)
    damaged[min(flip, len(content) - 1)] = value
    (folder / "damaged").write_bytes(damaged)
    try:
        assert isinstance(load_policy(folder / "damaged"), kvx.Policy)
    except BadInput as error:
        assert len(str(error).splitlines()) == 1


def test_a_shape_beyond_the_file_is_refused(tmp_path):
    header = {PLACE: {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}, "__metadata__": METADATA}
    text = json.dumps(header).encode()
    path = tmp_path / "policy"
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\x00" * 4)
    with pytest.raises(BadInput, match="policy file"):
        load_policy(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(BadInput, match="cannot be read"):
        load_policy(tmp_path / "missing")
