"""Claims about schedules, weight decay, and where an optimizer's state lies."""

import jax.numpy as jnp
import numpy as np
import pytest

from kvx.train.optimizer import optimizer, schedule
from tests.train.tiny_runs import stage


def rates(total, **changes):
    values = {"steps": total, "learning_rate": 2.0, "warmup": 4, **changes}
    return np.array([float(schedule(stage(**values), total)(step)) for step in range(total)])


@pytest.mark.parametrize("kind", ["cosine", "constant", "wsd"])
def test_a_schedule_grows_linearly_to_its_peak_and_no_step_is_lost(kind):
    found = rates(40, schedule=kind)
    np.testing.assert_allclose(found[:4], [0.5, 1.0, 1.5, 2.0], rtol=1e-6)
    assert found.max() == pytest.approx(2.0)


def test_the_cosine_is_half_way_in_the_middle_and_ends_near_zero():
    found = rates(44)
    assert found[24] == pytest.approx(1.0)
    assert 0 < found[-1] < 0.01


def test_wsd_is_constant_and_then_falls_as_one_minus_a_square_root():
    found = rates(40, schedule="wsd", decay=10)
    np.testing.assert_allclose(found[4:31], 2.0)
    np.testing.assert_allclose(found[30:], 2.0 * (1 - np.sqrt(np.arange(10) / 10)), rtol=1e-5)


def test_amounts_are_steps_or_shares():
    np.testing.assert_array_equal(rates(40, warmup=0.1), rates(40, warmup=4))


def test_only_matrices_decay():
    """With zero gradients Adam moves nothing, so what moves has decayed."""
    weights = {
        name: jnp.ones(shape)
        for name, shape in {"a.kernel": (2, 2), "a.table": (2, 2), "a.bias": (2, 2), "a.weight": (2,)}.items()
    }
    chain = optimizer(stage(weight_decay=0.1, warmup=0, schedule="constant"), 10)
    changes, _ = chain.update({name: jnp.zeros_like(w) for name, w in weights.items()}, chain.init(weights), weights)
    assert {name for name, change in changes.items() if np.any(change)} == {"a.kernel", "a.table"}
