"""Claims about page scores: bounds that hold, whatever the query."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvx.kernels.page_scores import page_scores
from tests.kernels.unchecked import unchecked

ON_GPU = jax.default_backend() == "gpu"
needs_new = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="Pallas on GPUs needs jax 0.11")


scores = {
    group: jax.jit(lambda queries, bounds, group=group: page_scores(queries, bounds, group=group))
    for group in ("max", "mean")
}


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 4))
def test_no_key_of_a_page_scores_higher_and_a_page_of_one_scores_as_its_key(seed, empty):
    """In float32 up to the rounding of two sums of 8 terms; pages without a key are -inf."""
    draw = np.random.default_rng(seed)
    queries = (draw.integers(-2, 3, (1, 2, 3, 1, 8)) * draw.normal(size=8)).astype(np.float32)  # zeros among them
    keys = draw.normal(size=(1, 2, 4, 5, 8)).astype(np.float32)
    held = (np.arange(4) >= empty)[:, None]
    bounds = [np.where(held, keys.min(axis=3), np.inf), np.where(held, keys.max(axis=3), -np.inf)]
    found = np.asarray(scores["max"](queries, np.concatenate(bounds, axis=-1).astype(np.float32)))
    logits = np.einsum("bgrd,bgpsd->bgrps", queries[:, :, :, 0], keys)
    assert np.all(found[..., empty:] >= logits.max(axis=(2, 4))[..., empty:] - 1e-5)
    assert np.all(np.isneginf(found[..., :empty]))
    alone = np.concatenate([keys[:, :, :, 0]] * 2, axis=-1)
    np.testing.assert_allclose(scores["max"](queries, alone), logits[..., 0].max(axis=2), atol=1e-5)
    np.testing.assert_allclose(scores["mean"](queries, alone), logits[..., 0].mean(axis=2), atol=1e-5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"bounds": jnp.zeros((1, 2, 4, 8))}, "8 channels, allowed are 16"),
        ({"bounds": jnp.zeros((1, 1, 4, 16))}, r"bounds has shape \(1, 1, 4, 16\), allowed is \(1, 2, any, any\)"),
        ({"group": "sum"}, "group is 'sum'"),
        ({"implementation": "mosaic_tpu"}, "16 channels, allowed are multiples of 128"),
        ({"implementation": "fastest"}, "'fastest'"),
    ],
)
def test_what_it_cannot_take_is_refused(changed, message):
    given = {"queries": jnp.zeros((1, 2, 3, 1, 8)), "bounds": jnp.zeros((1, 2, 4, 16))}
    with unchecked(), pytest.raises(ValueError, match=message):
        page_scores(**given | changed)
