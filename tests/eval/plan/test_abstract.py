"""Claims about caches of shapes: they are those of a real prefill, grow evenly with rows, and split as on a mesh."""

import jax
import jax.numpy as jnp
import pytest

import kvx
from kvx.eval.cost.cache_bytes import CacheBytes, parts
from kvx.eval.plan.abstract import Split, abstract_prefill, grown, shapes
from kvx.generate import full_policy
from kvx.mesh import place_model
from kvx.models.build import abstract_model
from tests import tiny
from tests.kvx.contract_cases import CASES, parameters

MODEL = {**tiny.CONFIG, "num_hidden_layers": 3}


def abstract(**changes):
    """The test model, or one with other config entries, as shapes."""
    return shapes(abstract_model({**MODEL, **changes}, jnp.bfloat16))


def sizes(cache):
    """Shape and dtype of every array, with where it is in the cache."""
    return [(part.path, part.array.shape, part.array.dtype) for part in cache]


@pytest.mark.sampled
@pytest.mark.parametrize("text", ["full", "snapkv(budget=64, window=8)+kivi(bits=2, group=32)", "h2o(budget=0.25)"])
def test_a_cache_of_shapes_is_that_of_a_real_prefill(text):
    policy, model = kvx.parse_policy(text), tiny.model(num_hidden_layers=2)
    tokens, _ = tiny.prompts(150, 150)
    _, real = kvx.prefill(model, tokens, policy, max_new_tokens=20)
    found = abstract_prefill(model, policy, 150, 2, 20)
    assert sizes(found.cache) == sizes(parts(real)) and not found.bound
    assert CacheBytes.of(found.cache).total == real.nbytes
    assert found.read == real.bytes_read() and found.tree == jax.tree.structure(real)


@pytest.mark.sampled
@pytest.mark.parametrize("name", parameters())
def test_every_cache_grows_evenly_with_its_rows(name):
    policy = CASES[name].build(128)
    model = shapes(abstract_model(MODEL, jnp.float32))
    one, two, five = (abstract_prefill(model, policy, 256, rows, 64).cache for rows in (1, 2, 5))
    assert sizes(grown(*pair, 5) for pair in zip(one, two, strict=True)) == sizes(five)


def test_where_the_data_decide_the_cache_is_the_largest_they_can_ask_for():
    policy, model = kvx.parse_policy("paged"), tiny.model(num_hidden_layers=2)
    tokens, _ = tiny.prompts(200, 200)
    _, real = kvx.prefill(model, tokens, policy, max_new_tokens=20)
    found = abstract_prefill(model, policy, 200, 2, 20)
    assert found.bound and real.nbytes <= CacheBytes.of(found.cache).total
    assert found.read is None


@pytest.mark.parametrize("chips", [1, 2])
def test_a_split_model_has_the_bytes_of_a_placed_one(chips):
    model = tiny.model(num_hidden_layers=2)
    placed = place_model(model, jax.make_mesh((chips,), ("tensor",)))
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(placed))
    assert Split(chips).parameters(model) == held


def test_a_split_cache_has_the_bytes_of_a_placed_one():
    model = tiny.model(num_hidden_layers=2)
    tokens, _ = tiny.prompts(100, 100)
    placed = place_model(model, jax.make_mesh((2,), ("tensor",)))
    _, real = kvx.prefill(placed, tokens, full_policy(), max_new_tokens=20)
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(real))
    cache = abstract_prefill(model, full_policy(), 100, 2, 20).cache
    assert Split(2).cache(cache, 2, 2).total == held < real.nbytes


def test_beyond_the_number_of_kv_heads_a_cache_no_longer_shrinks():
    model = abstract(num_attention_heads=16, num_key_value_heads=8)
    cache = abstract_prefill(model, full_policy(), 128, 1, 1).cache
    whole, eighth, held = (Split(chips).cache(cache, 1, 8) for chips in (1, 8, 16))
    assert (whole.total - whole.metadata) == 8 * (eighth.total - eighth.metadata)
    assert held.total == whole.total


def test_what_a_prefill_refuses_is_refused():
    model = abstract()
    with pytest.raises(kvx.errors.BadInput, match="positions"):
        abstract_prefill(model, full_policy(), 4096, 1, 128)
    with pytest.raises(kvx.errors.BadInput, match="calibrat"):
        abstract_prefill(model, kvx.parse_policy("q_filters(budget=64)"), 256, 1, 16)


def test_lengths_are_known_so_that_budgets_are_of_the_real_prompt():
    # PyramidKV's layers differ, by a share that depends on the shortest prompt that the widths admit.
    policy, model = kvx.parse_policy("pyramidkv(budget=0.25, window=8)"), tiny.model(num_hidden_layers=3)
    tokens, _ = tiny.prompts(200)
    _, real = kvx.prefill(model, tokens, policy, max_new_tokens=16)
    assert sizes(abstract_prefill(model, policy, 200, 1, 16).cache) == sizes(parts(real))
