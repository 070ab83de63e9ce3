"""Claims about amounts: slots and shares are told apart, floors are exact, nonsense is refused in one sentence."""

from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest

from kvx.errors import BadInput
from kvx.parts.amounts import Share, Slots, amount, fraction, one_of, whole


def test_one_slot_and_the_whole_prompt_are_different_amounts():
    assert amount(1) == Slots(1)
    assert amount(1.0) == Share(1.0)
    assert amount(1) != amount(1.0)


@pytest.mark.parametrize("value", [0, -3, 0.0, -0.5, 1.5, float("nan"), float("inf"), True])
def test_impossible_budgets_are_refused(value):
    with pytest.raises(BadInput, match=r"budget=.*; allowed: an int of at least 1 .* or a float in \(0, 1\]"):
        amount(value)


@pytest.mark.parametrize("share", ["0.1", "0.2", "0.25", "0.3", "0.7", "0.9", "1"])
def test_a_share_of_every_length_is_floored_exactly(share):
    exact = [max(1, int(Fraction(share) * length)) for length in range(1, 3000)]
    found = Share(float(share)).of(jnp.arange(1, 3000, dtype=jnp.int32), 3000)
    np.testing.assert_array_equal(found, exact)
    assert Share(float(share)).most(2999) == exact[-1]


def test_slots_do_not_depend_on_the_prompt():
    np.testing.assert_array_equal(Slots(7).of(jnp.asarray([1, 100], jnp.int32), 100), [7, 7])
    assert Slots(7).most(3) == 7


@pytest.mark.parametrize("value", [1.0, True, "2", None, 0, 9])
def test_whole_numbers_are_ints_in_range(value):
    with pytest.raises(BadInput, match=r"window=.*an int from 1 to 8"):
        whole(value, "window", least=1, most=8)
    assert whole(np.int32(8), "window", least=1, most=8) == 8


def test_an_upper_bound_of_zero_is_a_bound():
    with pytest.raises(BadInput, match="from 0 to 0"):
        whole(3, "stop", least=0, most=0)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), True, "0.5", None])
def test_fractions_are_numbers_from_0_to_1(value):
    with pytest.raises(BadInput, match=r"alpha=.* from 0 to 1"):
        fraction(value, "alpha")


def test_ends_of_the_range_are_fractions():
    assert (fraction(0, "alpha"), fraction(1, "alpha")) == (0.0, 1.0)


def test_choices_are_compared_by_type_too():
    assert one_of(2, "bits", (2, 4, None)) == 2
    assert one_of(None, "bits", (2, 4, None)) is None
    for value in (2.0, True, 3, "2"):
        with pytest.raises(BadInput, match=r"bits=.* is not offered; allowed: 2, 4, None"):
            one_of(value, "bits", (2, 4, None))
