"""Claims about what a cache's bytes are: nothing of a store's keys and values is left out or counted twice."""

import jax
import jax.numpy as jnp
import pytest

import kvx
from kvx.eval.cost.cache_bytes import CacheBytes, parts
from kvx.eval.plan.abstract import abstract_prefill, shapes
from kvx.generate import full_policy
from kvx.models.build import abstract_model
from tests import tiny
from tests.kvx.contract_cases import CASES, parameters

TABLES = {"extremes", "landmarks", "norms", "ranges"}
"""Wide arrays that say which tokens to read, or scale them, and are no tokens themselves."""


def test_metadata_of_a_full_cache_is_positions_rotations_and_counters():
    tokens, _ = tiny.prompts(100, 100)
    _, cache = kvx.prefill(tiny.model(num_hidden_layers=2), tokens, full_policy(), max_new_tokens=20)
    slots, layers, rows, heads = 256, 2, 2, 2
    positions = layers * rows * heads * slots * 4
    rotations = layers * (32 // 2 + 1) * 4
    found = CacheBytes.of(parts(cache))
    assert found.metadata == positions + rotations + (rows + 1) * 4
    assert found.total - found.metadata == layers * rows * heads * slots * (32 + 32) * 4
    assert found.total == cache.nbytes and found.host == 0 and found.device == found.total


@pytest.mark.parametrize("name", parameters())
def test_every_wide_array_is_content_or_a_known_table(name):
    model = shapes(abstract_model({**tiny.CONFIG, "num_hidden_layers": 3}, jnp.float32))
    cache = abstract_prefill(model, CASES[name].build(128), 256, 2, 64).cache
    # Content has channels, codes of them or rows of factors in its last axis; one number a slot is never content.
    for part in cache:
        last = part.path[-1]
        statistic = isinstance(last, jax.tree_util.DictKey)  # as HashEvict's signs
        if part.array.ndim == 4 or part.array.dtype == jnp.uint32:
            assert part.content or statistic or last.name in TABLES, part.path
    found = CacheBytes.of(cache)
    assert 0 < found.metadata < found.total


def test_values_that_wait_on_the_host_are_counted_there():
    tokens, _ = tiny.prompts(300)
    _, cache = kvx.prefill(tiny.model(num_hidden_layers=2), tokens, CASES["shadowkv"].build(64))
    found = CacheBytes.of(parts(cache))
    assert found.host == cache.host_nbytes > 0 and found.total == cache.nbytes
