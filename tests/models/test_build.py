"""Claims about building a model: what is checked before memory is taken, and that saving undoes loading."""

import dataclasses
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kvx.errors import BadInput
from kvx.models.build import (
    RandomTensors,
    abstract_model,
    config_from_model,
    model_from_checkpoint,
    random_model,
    tensors_from_model,
)
from kvx.models.checkpoint import Checkpoint
from kvx.models.readers import read_checkpoint, write_checkpoint
from tests.models.tiny_configs import CONFIGS, GEMMA3, LLAMA, QWEN2


class ArrayTensors(dict):
    """Arrays by name, as a checkpoint's tensors."""

    def shape(self, name):
        """Its shape."""
        return self[name].shape


def checkpoint(config=LLAMA, seed=0, **changes):
    """A random checkpoint with tensors replaced, added, or (None) left out."""
    tensors = RandomTensors(config, seed)
    arrays = ArrayTensors({name: tensors[name] for name in tensors})
    for name, array in changes.pop("tensors", {}).items():
        arrays.pop(name, None)
        if array is not None:
            arrays[name] = array
    return Checkpoint({**config, **changes}, arrays, None, {})


@pytest.mark.parametrize("name", CONFIGS)
def test_tensors_of_a_model_are_those_it_was_built_from(name):
    source = checkpoint(CONFIGS[name])
    tensors = tensors_from_model(model_from_checkpoint(source, jnp.float32))
    assert set(tensors) == set(source.tensors) and len(tensors) == len(source.tensors)
    for tensor in tensors:
        assert tensors.shape(tensor) == source.tensors[tensor].shape
        np.testing.assert_array_equal(tensors[tensor], source.tensors[tensor])


@pytest.mark.parametrize("name", ["llama3.2-tied", "qwen3-window-biases", "gemma3"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_saving_and_loading_gives_the_same_model(name, dtype, tmp_path):
    model = random_model(CONFIGS[name], seed=5, dtype=dtype)
    write_checkpoint(tmp_path / "saved", config_from_model(model), tensors_from_model(model), None, {})
    again = model_from_checkpoint(read_checkpoint(tmp_path / "saved"), dtype)
    for before, after in zip(jax.tree.leaves(model), jax.tree.leaves(again), strict=True):
        assert before.dtype == after.dtype
        np.testing.assert_array_equal(before, after)
    assert [block.spec for block in again.blocks] == [block.spec for block in model.blocks]


def test_rotary_factors_of_a_gguf_file_survive_saving(tmp_path):
    factors = np.linspace(1, 8, 8).tolist()
    model = random_model(LLAMA | {"rope_factors": factors})
    plain = random_model(LLAMA).blocks[0].rotary.frequencies
    np.testing.assert_allclose(model.blocks[0].rotary.frequencies, plain / np.asarray(factors), rtol=1e-6)
    write_checkpoint(tmp_path / "saved", config_from_model(model), tensors_from_model(model), None, {})
    again = model_from_checkpoint(read_checkpoint(tmp_path / "saved"), jnp.float32)
    np.testing.assert_allclose(again.blocks[0].rotary.frequencies, model.blocks[0].rotary.frequencies, rtol=1e-6)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others():
    one, same, other = (jax.tree.leaves(random_model(LLAMA, seed=seed)) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(one, same, strict=True))
    assert not np.array_equal(one[-1], other[-1])


def test_weights_are_cast_to_the_dtype_asked_for():
    half = {name: array.astype(ml_dtypes.bfloat16) for name, array in checkpoint().tensors.items()}
    model = model_from_checkpoint(checkpoint(tensors=half), jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype(jnp.float32)}
    np.testing.assert_array_equal(model.norm.weight[...], half["model.norm.weight"].astype(np.float32))


def test_old_buffers_and_a_second_copy_of_a_tied_matrix_are_ignored():
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}
    extra["lm_head.weight"] = np.zeros((256, 64), np.float32)
    model = model_from_checkpoint(checkpoint(QWEN2, tensors=extra), jnp.float32)
    assert "lm_head.weight" not in set(tensors_from_model(model))


def test_filling_needs_one_parameter_more_than_the_model():
    source = checkpoint(LLAMA | {"vocab_size": 4096, "num_hidden_layers": 16})
    largest = 4096 * 64 * 4
    tracemalloc.start()
    try:
        model = model_from_checkpoint(source, jnp.float32)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # numpy's arrays are traced, jax's own are not; Python objects of the modules take the rest.
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(model)) > 3 * largest
    assert peak - held < 2.5 * largest


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"tensors": {"model.norm.weight": None}}, "lacks tensor 'model.norm.weight': expected shape \\(64,\\)"),
        (
            {"tensors": {f"model.layers.{i}.mlp.up_proj.weight": None for i in range(3)}},
            "lacks tensor 'model.layers.0.mlp.up_proj.weight' and 2 more",
        ),
        (
            {"tensors": {"model.layers.3.mlp.up_proj.weight": np.ones((2, 2))}},
            "'model.layers.3.mlp.up_proj.weight'.*no place",
        ),
        ({"tensors": {"model.layers.0.self_attn.q_proj.bias": np.ones(64)}}, "q_proj.bias'.*no place"),
        (
            {"tensors": {"lm_head.weight": np.ones((64, 256))}},
            "'lm_head.weight' has shape \\(64, 256\\): expected \\(256, 64\\)",
        ),
        ({"tensors": {"lm_head.weight": np.ones((256, 64), np.int8)}}, "'lm_head.weight' has dtype int8"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "unknown architecture.*known:.*LlamaForCausalLM"),
        ({"architectures": "LlamaForCausalLM"}, "architectures='LlamaForCausalLM'"),
        ({"architectures": None, "model_type": "lama"}, "unknown model_type 'lama': did you mean 'llama'"),
        ({"architectures": None, "model_type": None}, "unknown model_type"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000.*30 tensors"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"hidden_size": "wide"}, "hidden_size='wide'"),
        ({"hidden_size": 66}, "hidden_size=66.*multiple of num_attention_heads=4"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"vocab_size": True}, "vocab_size=True"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3.*divisor"),
        ({"head_dim": 15}, "head_dim=15.*even"),
        ({"head_dim": 10**6}, "head_dim=1000000"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps=inf"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes'"),
    ],
)
def test_bad_checkpoints_are_refused_in_one_sentence(changes, sentence):
    with pytest.raises(BadInput, match=sentence) as refusal:
        model_from_checkpoint(checkpoint(**changes), jnp.float32)
    assert "\n" not in str(refusal.value)


def test_a_tensor_that_reads_unlike_its_header_is_refused():
    class Lying(ArrayTensors):
        def __getitem__(self, name):
            return super().__getitem__(name)[..., :-1]

        def shape(self, name):
            return super().__getitem__(name).shape

    source = checkpoint()
    with pytest.raises(BadInput, match="reads as shape"):
        model_from_checkpoint(dataclasses.replace(source, tensors=Lying(source.tensors)), jnp.float32)


@pytest.mark.parametrize(("dtype", "shown"), [(jnp.int8, "int8"), ("fp32", "fp32"), (jnp.float64, "float64")])
def test_an_unsupported_dtype_is_refused(dtype, shown):
    with pytest.raises(BadInput, match=f"dtype={shown}: expected float32, bfloat16 or float16"):
        random_model(LLAMA, dtype=dtype)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_part_of_a_multimodal_gemma_is_a_model_of_its_own(prefix):
    plain = checkpoint(GEMMA3 | {"num_attention_heads": 8, "num_key_value_heads": 4})
    tensors = {name.replace("model.", prefix, 1): array for name, array in plain.tensors.items()}
    tensors["vision_tower.encoder.weight"] = tensors["multi_modal_projector.weight"] = np.ones((2, 2))
    # A nested config leaves out what equals the defaults: here the numbers of heads.
    inner = {key: value for key, value in GEMMA3.items() if not key.startswith(("num_attention", "num_key", "arch"))}
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": inner}
    model = model_from_checkpoint(Checkpoint(config, ArrayTensors(tensors), None, {}), jnp.float32)
    for ours, theirs in zip(
        jax.tree.leaves(model), jax.tree.leaves(model_from_checkpoint(plain, jnp.float32)), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    assert config_from_model(model)["architectures"] == ["Gemma3ForCausalLM"]
    with pytest.raises(BadInput, match="text_config=None"):
        model_from_checkpoint(Checkpoint(config | {"text_config": None}, ArrayTensors(), None, {}), jnp.float32)


def test_an_abstract_model_of_8_billion_parameters_takes_no_memory():
    config = LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    config |= {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
    model = abstract_model(config, jnp.bfloat16)
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) > 8e9
    # Only the rotary frequencies exist.
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(model) if isinstance(leaf, jax.Array)) == 32 * 64 * 4


def test_a_saved_config_names_its_architecture():
    config = {key: value for key, value in GEMMA3.items() if key != "architectures"}
    assert config_from_model(random_model(config))["architectures"] == ["Gemma3ForCausalLM"]
