"""Claims about conversions of the real SmolLM2-135M: exact ones on real weights, and which start is nearest."""

from functools import cache

import jax.numpy as jnp
import numpy as np
import pytest

import kvx
from kvx.prose import documents, prose
from kvx.train.convert import convert, measure_moments, parse_recipe
from kvx.train.convert.perplexity import perplexity

pytestmark = [pytest.mark.slow, pytest.mark.weights]


@cache
def loaded():
    """The model, held-out windows, and moments over other text."""
    model, tokenizer = kvx.load("smollm2-135m-instruct")
    text = prose()
    calibration = documents(tokenizer, text.haystack, 16, 256)
    return (
        model,
        documents(tokenizer, text.held_out, 4, 256),
        measure_moments(model, [calibration[:8], calibration[8:]]),
    )


@cache
def measured(recipe: str) -> float:
    model, rows, moments = loaded()
    converted, _ = convert(model, parse_recipe(recipe), moments)
    return perplexity(converted, rows)


def test_nothing_compressed_is_the_source():
    model, rows, moments = loaded()
    converted, report = convert(model, parse_recipe("transmla(rank=192, rotary=192, fold=1)"), moments)
    assert report.after == report.before == 4 * 30 * 384
    # Logits here reach 30, and 30 layers of float32 matrices were multiplied out anew.
    first = jnp.asarray(rows[:1, :64])
    np.testing.assert_allclose(converted(first), model(first), atol=2e-3)


def test_bytes_are_the_sheet_s():
    """The authors' own shape: r 16 and rotary 32 of 384, 12.5 percent."""
    model, _, _ = loaded()
    _, report = convert(model, parse_recipe("x_ecomla(rank=16, rotary=32, query_rank=400, layers='all')"))
    assert report.after / report.before == 0.125


@pytest.mark.long
def test_starts_by_their_distance_from_the_source():
    """At a quarter of the cache and equal bytes: what looks at activations is far ahead, and ours is ahead of that."""
    best, transmla = measured("by_effect(rank=64, rotary=32)"), measured("transmla(rank=64, rotary=32)")
    weights = [measured("mha2mla(rank=72, rotary=24)"), measured("x_ecomla(rank=64, rotary=32)")]
    assert best < transmla < min(weights) / 5
