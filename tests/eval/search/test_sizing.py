"""Claims about sizes: from shapes alone they are those of the cache, and what the model cannot have says why."""

import numpy as np
import pytest

import kvx
from kvx.errors import BadInput
from kvx.eval.search.sizing import Prompts, cache_sizes
from tests.tiny import model, prompts


def batch(*lengths, room=24):
    tokens, counts = prompts(*lengths)
    return Prompts(tokens, counts, room)


TEXTS = ("full", "snapkv(budget=0.25, window=8)", "h2o(budget=0.25)+kivi(bits=4, group=16, residual=32)")


@pytest.mark.parametrize("lengths", [(190, 170), pytest.param((64,), marks=pytest.mark.slow)])
def test_a_size_from_shapes_is_that_of_the_cache(lengths):
    given = batch(*lengths)
    policies = [kvx.parse_policy(text) for text in TEXTS]
    _, caches = kvx.prefill(model(), given.tokens, tuple(policies), given.lengths, max_new_tokens=given.room)
    assert cache_sizes(model(), given, policies) == [cache.nbytes // len(lengths) for cache in caches]


def test_nothing_is_computed_where_shapes_say_the_size(monkeypatch):
    monkeypatch.setattr("kvx.eval.search.sizing.prefill_each", lambda *_: pytest.fail("a prompt was read"))
    (size,) = cache_sizes(model(), batch(64), [kvx.policies.h2o(budget=0.5)])
    assert isinstance(size, int) and size > 0


def test_where_only_the_data_decide_the_prompt_is_read():
    policy, given = kvx.policies.fastgen(0.5), batch(190, 170)
    (size,) = cache_sizes(model(), given, [policy])
    _, cache = kvx.prefill(model(), given.tokens, policy, given.lengths, max_new_tokens=given.room)
    assert policy.measures and size == cache.nbytes // 2


def test_at_the_end_of_a_models_positions_the_prompt_is_read_since_padding_has_no_place():
    small = model(max_position_embeddings=120)
    given = Prompts(np.ones((1, 90), np.int32), np.asarray([90], np.int32), 24)
    (size,) = cache_sizes(small, given, [kvx.policies.full()])
    _, cache = kvx.prefill(small, given.tokens, kvx.policies.full(), max_new_tokens=24)
    assert size == cache.nbytes


def test_what_a_model_cannot_have_is_told_beside_the_sizes_of_the_others():
    refused, size = cache_sizes(model(), batch(64), [kvx.policies.latent_codes(), kvx.policies.full()])
    assert isinstance(refused, BadInput) and "latent" in str(refused) and isinstance(size, int)
