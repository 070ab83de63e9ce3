"""Compile decode steps (and a prefill) of Llama-3 shapes for a TPU v5e 2x2 without one, and print what
the compiler made of them.

    python -m tests.kvx.decode_step_for_v5e --layers 32

prints one JSON object per program. Needs libtpu; run alone, since one process at a time may hold it.
"""

import argparse
import json
import math
import os
import re
from collections import Counter

# libtpu must neither look for a cloud's metadata server nor become the default backend.
os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

import kvx
from kvx.kernels.implementations import compiling_for
from kvx.mesh import RULES, Rules, place_cache, place_model, place_rows, placement_of
from kvx.models.build import abstract_model
from kvx.policy_text import parse_policy
from kvx.step import decode
from kvx.stores.host import HOST

BATCH, SLOTS, ROOM, KV_HEADS = 8, 4096, 128, 8
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": KV_HEADS,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
# Llama-3.2-1B's heads of 64, which do not fill the lanes of a TPU.
NARROW = LLAMA_8B | {"hidden_size": 2048, "intermediate_size": 8192, "head_dim": 64}
# Name: policy, prompt length (dense ones leave a cache of SLOTS slots a head), rules under which the step is compiled,
# model.
PROGRAMS = {
    "full": ("full()", SLOTS - ROOM, RULES, LLAMA_8B),
    "narrow": ("full()", SLOTS - ROOM, RULES, NARROW),
    "narrow quest": ("quest(budget=512, skip=())", SLOTS - ROOM, RULES, NARROW),
    "narrow adakv": ("adakv(budget=1024)", SLOTS - ROOM, RULES, NARROW),
    "narrow paged": ("paged()", SLOTS - ROOM, RULES, NARROW),
    "narrow kivi": ("kivi(bits=2)", SLOTS - ROOM, RULES, NARROW),
    "narrow streaming": (f"streaming_llm(budget={SLOTS - ROOM})", SLOTS - ROOM, RULES, NARROW),
    "snapkv": (f"snapkv(budget={SLOTS - ROOM})", 2 * SLOTS, RULES, LLAMA_8B),
    # A long prompt, so that most of it lies on the host.
    "shadowkv": ("shadowkv(budget=2048)", 8 * SLOTS, RULES, LLAMA_8B),
    # Not a step: the prompt, with its column sums.
    "prefill": ("h2o(budget=512)", 1024, RULES, LLAMA_8B),
    # The control: a step that wants every KV head on every chip must gather the cache, and the count must show it.
    "gathering": ("full()", SLOTS - ROOM, Rules(kv_heads=None), LLAMA_8B),
}
COLLECTIVE = re.compile(r"= (\S.*?) ((?:all|collective|reduce-scatter|ragged)[\w-]*)\(")


def report(name: str, layers: int) -> dict:
    """Compile one program; collectives by kind with their largest shape, and bytes per chip."""
    text, prompt, rules, config = PROGRAMS[name]
    policy = parse_policy(text)
    chips = np.array(topologies.get_topology_desc("v5e:2x2", platform="tpu").devices)
    mesh = jax.sharding.Mesh(chips.reshape(1, 4), ("data", "tensor"))
    shapes = jax.tree.map(shape_of, abstract_model(config | {"num_hidden_layers": layers}, jnp.bfloat16))
    model, split = place_model(shapes, mesh, rules), placement_of(place_model(shapes, mesh))

    def prefilled(model, tokens, lengths):
        return kvx.prefill(model, tokens, policy, lengths, max_new_tokens=ROOM)[1]

    row = jax.ShapeDtypeStruct((BATCH,), jnp.int32)
    tokens = jax.ShapeDtypeStruct((BATCH, prompt), jnp.int32)
    cache = jax.eval_shape(prefilled, model, tokens, row)
    cache = place_cache(split, cache, BATCH, KV_HEADS)

    def step(model, token, cache, active):
        return decode(model, token, cache, policy, active)

    tokens, row, active = place_rows(split, (tokens, row, jax.ShapeDtypeStruct((BATCH,), bool)))
    if name == "prefill":
        compiled = jax.jit(prefilled).lower(model, tokens, row).compile()
    else:
        compiled = jax.jit(step, donate_argnums=2).lower(model, row, cache, active).compile()
    memory, leaves = compiled.memory_analysis(), jax.tree.leaves(cache.storage)
    return {
        "program": name,
        "layers": layers,
        "collectives": collectives(compiled.as_text()),
        "cache_bytes": sum(bytes_on_chip(leaf) for leaf in leaves if leaf.sharding.memory_kind != HOST),
        "host_bytes": sum(bytes_on_chip(leaf) for leaf in leaves if leaf.sharding.memory_kind == HOST),
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "host_argument_bytes": memory.host_argument_size_in_bytes,
        "host_alias_bytes": memory.host_alias_size_in_bytes,
        "host_temporary_bytes": memory.host_temp_size_in_bytes,
    }


def collectives(text: str) -> dict[str, dict]:
    """For each kind of collective in a compiled program: how many, and the entries of the largest array it yields."""
    counts, largest = Counter(), Counter()
    for shape, kind in COLLECTIVE.findall(text):
        entries = [math.prod(map(int, dims.split(","))) for dims in re.findall(r"\w\[([\d,]+)\]", shape)]
        counts[kind] += 1
        largest[kind] = max([largest[kind], *entries])
    return {kind: {"count": counts[kind], "largest": largest[kind]} for kind in sorted(counts)}


def shape_of(array) -> jax.ShapeDtypeStruct:
    """Constants of the abstract model are arrays, which a machine without the chips cannot place."""
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def bytes_on_chip(leaf: jax.ShapeDtypeStruct) -> int:
    """Of one sharded array."""
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("programs", nargs="*", default=["full", "snapkv"], help=f"of {', '.join(PROGRAMS)}")
    options = parser.parse_args()
    with compiling_for("tpu"):  # with the kernels that a TPU would run
        for each in options.programs:
            print(json.dumps(report(each, options.layers)), flush=True)
