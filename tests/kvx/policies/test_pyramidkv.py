"""Claims about PyramidKV (Cai et al. 2024): the schedule conserves its total, and layers select as SnapKV does."""

import numpy as np
import pytest

from kvx import policies
from kvx.errors import BadInput
from kvx.parts.amounts import Slots
from kvx.parts.budgets import Pyramid
from tests.kvx.policies.direct import context, evidence, kept, tokens
from tests.kvx.policies.test_snapkv import random_rows


def schedule(length, capacity, window, layers, beta):
    """Whole slots of each layer, windows included."""
    table = Pyramid(Slots(capacity), window, beta).table(np.array([length]), np.array([capacity]), layers, np)
    return table[:, 0]


@pytest.mark.parametrize(
    ("length", "capacity", "window", "layers", "beta", "first", "released"),
    [
        (7500, 128, 8, 32, 20, 234, 4016),
        (7500, 512, 8, 32, 20, 983, 16576),
        (7500, 2048, 8, 32, 20, 3978, 65296),
        (100, 40, 8, 4, 20, 62, 132),
        (64, 16, 8, 4, 20, 16, 34),
    ],
)
def test_golden_schedules(length, capacity, window, layers, beta, first, released):
    """The bottom layer is the released code's (up to its floor of the top); its total overshoots, ours does not."""
    counts = schedule(length, capacity, window, layers, beta) - window
    total = layers * (capacity - window)
    assert counts.sum() == total < released
    assert first - 1 <= counts[0] <= first
    assert np.all(np.diff(counts) <= 0)
    # Largest remainder: nobody is a whole slot away from the straight line.
    bottom = min((2 - 1 / beta) * (capacity - window), length - window)
    line = bottom - np.arange(layers) * (2 * bottom - 2 * (capacity - window)) / (layers - 1)
    assert np.abs(counts - line).max() < 1


def test_no_layer_gets_more_than_the_prompt_has():
    for length in range(60, 130):
        assert schedule(length, 40, 8, 6, 20).max() <= length


def test_a_slope_of_one_is_level():
    np.testing.assert_array_equal(schedule(500, 100, 8, 7, 1), 100)


def test_short_prompts_are_level():
    np.testing.assert_array_equal(schedule(63, 40, 8, 4, 20), 40)
    assert np.ptp(schedule(64, 40, 8, 4, 20)) > 0


def test_one_layer_gets_the_budget():
    np.testing.assert_array_equal(schedule(500, 100, 8, 1, 20), [100])


def test_layers_keep_their_counts_of_snapkvs_ranking():
    length, layers, rows = 80, 4, random_rows(2, 2, 4, 80)
    counts = schedule(length, 24, 4, layers, 20)
    for layer in range(layers):
        where = context(length, layer=layer, layers=layers)
        some, seen = tokens(2, length), evidence(length, rows=rows)
        pyramid = kept(policies.pyramidkv(24, window=4), some, seen, where)
        snap = kept(policies.snapkv(int(counts[layer]), window=4), some, seen, where)
        np.testing.assert_array_equal(pyramid, snap)
    assert len(set(counts)) == layers


def test_a_table_gives_counts_outright_and_must_fit_the_model():
    length, rows = 40, random_rows(1, 1, 2, 40)
    policy = policies.pyramidkv(8, window=2, table=(12, 5, 3))
    some, seen = tokens(1, length), evidence(length, rows=rows)
    found = [kept(policy, some, seen, context(length, layer, 3)).sum() for layer in range(3)]
    assert found == [12, 5, 3]
    with pytest.raises(BadInput, match="3 entries"):
        policy.capacity(context(length, layers=4).spec, 0)


def test_static_capacities_hold_every_admissible_prompt():
    spec = context(200, layers=5).spec
    budget = Pyramid(Slots(30), 4, 20)
    for layer in range(5):
        needed = [min(schedule(length, 30, 4, 5, 20)[layer], length) for length in range(1, 201)]
        assert budget.capacity(spec, layer) == max(needed)
