"""What is compiled, and how often: no cache-sized copies while decoding, no new program from one prompt to the next."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvx
from kvx.generate import _generate
from kvx.kernels.decode_attention import decode_attention
from kvx.loop import attend_turned, pack_layer
from kvx.step import decode
from tests import tiny

COPY = re.compile(r"= (\w+\[[\d,]*\])(?:\{[^}]*\})? (?:copy|copy-start)\(")


@pytest.fixture(scope="module")
def model():
    return tiny.model(num_hidden_layers=3)


def copies(compiled: str, shapes: set[tuple[int, ...]]) -> int:
    """Copies of arrays of these shapes in a compiled program."""
    found = 0
    for kind in COPY.findall(compiled):
        dims = tuple(int(size) for size in kind[kind.index("[") + 1 : -1].split(",") if size)
        found += dims in shapes
    return found


def large_shapes(cache) -> set[tuple[int, ...]]:
    """Shapes of the cache's arrays that grow with its slots."""
    return {leaf.shape for leaf in jax.tree.leaves(cache) if leaf.size >= 4096}


POLICIES = (
    "full",
    "streaming_llm(budget=320)",
    "h2o(budget=320)",
    "snapkv(budget=320)",
    "tova(budget=320)",
    "adakv(budget=320)",
    "d2o(budget=320, skip=(0,))",
    "cake(budget=320)",
    "fastgen(recovery=0.85)",
    "roco(budget=320)",
    "cam(budget=320)",
    "cam(budget=320, every=4)",
    "hashevict(budget=320)",
    "quest(budget=64)",
    "shadowkv(budget=64, rank=32)",
    "paged",
    "kivi(bits=4, group=32)",
    "quantspec(group=32)",
    "mikv(high=320)",
    "razor_attention(buffer=320, heads=((0, 1), (2, 0), (2, 1)))",
    "minicache(start=0.34)",
    "pyramidinfer(recent=0.01, block=4)",
    "ape",
    "tidaldecode(budget=32, layers=(0,))",
    "tidaldecode(budget=32, layers=(0,), group='mean')",
)
QUICK = {"full", "h2o(budget=320)", "adakv(budget=320)", "quest(budget=64)", "kivi(bits=4, group=32)", "paged"}


@pytest.mark.parametrize(
    "text", [text if text in QUICK else pytest.param(text, marks=pytest.mark.slow) for text in POLICIES]
)
def test_the_decode_loop_copies_no_cache_sized_array(model, text):
    """While the loop runs: what it may copy once before and after does not count, since donation is the caller's."""
    assert copies_of_a_step(model, text) == 0


def test_nor_where_a_single_row_and_head_make_it_the_only_one():
    assert copies_of_a_step(tiny.model(num_hidden_layers=3, num_key_value_heads=1), "full") == 0


def copies_of_a_step(model, text):
    """Copies of large cache arrays in one compiled decode step."""
    policy = kvx.parse_policy(text)
    tokens, _ = tiny.prompts(600)
    _, cache = kvx.prefill(model, tokens, policy, max_new_tokens=128)
    shapes = large_shapes(cache)
    # As flat leaves: lowering describes arguments by placeholders, which the run-time shape checks of tests refuse.
    leaves, structure = jax.tree.flatten(cache)

    @partial(jax.jit, donate_argnums=2)
    def step(model, token, leaves):
        logits, after = decode(model, token, jax.tree.unflatten(structure, leaves), policy, jnp.ones(1, bool))
        return logits, jax.tree.leaves(after)

    compiled = step.lower(model, jnp.zeros(1, jnp.int32), leaves).compile().as_text()
    return copies(compiled, shapes)


def test_the_counter_finds_the_copies_of_reading_before_appending():
    """The control: the same read and write in the other order."""
    keys = jnp.zeros((1, 2, 1024, 32), jnp.float32)
    query, token = jnp.ones((1, 2, 2, 1, 32)), jnp.ones((1, 2, 1, 32))
    slots = jnp.broadcast_to(jnp.arange(1024, dtype=jnp.int32), (1, 2, 1024))

    def step(keys, query, token, at):
        part = decode_attention(query, keys, keys, jnp.full((1, 1), 2000), slots, scale=1.0)
        return jax.lax.dynamic_update_slice_in_dim(keys, token, at, axis=2), part.out

    def loop(keys, query, token):
        def body(index, state):
            keys, total = state
            keys, out = step(keys, query, token, index)
            return keys, total + out

        return jax.lax.fori_loop(0, 100, body, (keys, jnp.zeros((1, 2, 2, 1, 32))))

    compiled = jax.jit(loop, donate_argnums=0).lower(keys, query, token).compile().as_text()
    assert copies(compiled, {keys.shape}) > 0


def test_prompts_seeds_and_lengths_of_one_bucket_share_their_programs(model):
    policy = kvx.policies.snapkv(budget=48, window=8)
    rule = kvx.sampling(temperature=0.8, top_p=0.9)
    tokens, _ = tiny.prompts(100)
    kvx.generate(model, tokens, policy=policy, max_new_tokens=9, sampling=rule, stop=(1,), seed=0)
    before = (_generate._cache_size(), attend_turned._cache_size())
    for length, count, seed, temperature in ((90, 5, 1, 0.5), (128, 20, 2, 1.5), (70, 128, 3, 1.0)):
        tokens, _ = tiny.prompts(length, seed=seed)
        rule = kvx.sampling(temperature=temperature, top_p=0.9)
        kvx.generate(model, tokens, policy=policy, max_new_tokens=count, sampling=rule, stop=(1, 2), seed=seed)
    assert (_generate._cache_size(), attend_turned._cache_size()) == before


def test_prefill_compiles_one_body_for_all_equal_layers():
    tokens, _ = tiny.prompts(100)
    policy = kvx.policies.h2o(budget=32)
    kvx.prefill(tiny.model(num_hidden_layers=2, hidden_size=32), tokens, policy)
    before = attend_turned._cache_size(), pack_layer._cache_size()
    kvx.prefill(tiny.model(num_hidden_layers=6, hidden_size=32), tokens, policy)
    # Packing knows how many layers there are, so another model compiles it anew: once.
    assert (attend_turned._cache_size(), pack_layer._cache_size()) == (before[0], before[1] + 1)


def test_budgets_that_python_calls_equal_do_not_share_a_program(model):
    """1 == 1.0 == True: as a static field the first trace would serve all."""
    tokens, _ = tiny.prompts(60)
    _, one = kvx.prefill(model, tokens, kvx.policies.knorm(budget=1))
    _, everything = kvx.prefill(model, tokens, kvx.policies.knorm(budget=1.0))
    count = lambda cache: int(np.sum(np.asarray(cache.layers[0].positions()) >= 0))  # noqa: E731
    assert (count(one), count(everything)) == (2, 120)
