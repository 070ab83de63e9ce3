"""Claims about rank rules: the paper's count, conserved totals, refusals."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvx.errors import BadInput
from kvx.train.convert.ranks import Budget, Energy, Fixed, rounded_up

spectra = st.lists(
    st.lists(st.floats(0.01, 10), min_size=32, max_size=64).map(lambda s: np.sort(np.asarray(s))[::-1]),
    min_size=1,
    max_size=6,
)


@settings(max_examples=20, deadline=None)
@given(spectra, st.floats(0.05, 0.999))
def test_energy_is_the_paper_s_count_rounded_up(found, share):
    for spectrum, rank in zip(found, Energy(share)(found), strict=True):
        cumulative = np.cumsum(spectrum**2) / np.sum(spectrum**2)
        count = max(1, int(np.sum(cumulative <= share * (1 + 1e-12))))
        assert rank == min(rounded_up(count, 8), len(spectrum))


def test_energy_by_hand():
    """Shares 0.5, 0.8, 1.0: below 0.8 inclusive are two, one less than it takes to go beyond it."""
    spectrum = np.sqrt(np.asarray([5.0, 3.0, 2.0]))
    assert Energy(0.8, multiple=1)([spectrum]) == (2,)
    assert Energy(0.79, multiple=1)([spectrum]) == (1,)
    assert Energy(0.1, multiple=1)([spectrum]) == (1,)
    assert Energy(0.1, multiple=8)([spectrum]) == (3,)


def test_zeros_are_never_counted():
    """A stack of 2 G D rows in a wider model has no more terms, whatever rounding makes of the rest."""
    spectrum = np.concatenate([np.linspace(3, 1, 10), np.full(20, 1e-15)])
    assert Energy(1.0)([spectrum]) == (10,)


def test_the_ends_may_be_fixed():
    flat = np.ones(40)
    assert Energy(0.5, ends=4)([flat, flat, flat]) == (4, 24, 4)


@settings(max_examples=20, deadline=None)
@given(spectra, st.sampled_from([8, 16, 24]))
def test_a_budget_conserves_its_total(found, mean):
    ranks = Budget(mean)(found)
    assert sum(ranks) == mean * len(found)
    assert all(rank % 8 == 0 and 8 <= rank <= len(spectrum) for rank, spectrum in zip(ranks, found, strict=True))


def test_a_budget_goes_where_the_energy_is():
    steep, flat = np.asarray([10.0] * 8 + [0.1] * 24), np.ones(32)
    assert Budget(16)([steep, flat]) == (8, 24)


def test_no_other_split_of_the_budget_keeps_more():
    random = np.random.default_rng(0)
    found = [np.sort(random.random(32))[::-1] for _ in range(2)]
    ranks = Budget(16, relative=False)(found)

    def kept(ranks):
        return sum(np.sum(spectrum[:rank] ** 2) for spectrum, rank in zip(found, ranks, strict=True))

    assert all(kept(ranks) >= kept((first, 32 - first)) for first in (8, 16, 24))


def test_equal_layers_get_equal_ranks():
    flat = np.ones(64)
    assert Budget(24)([flat] * 4) == Fixed(24)([flat] * 4) == (24,) * 4


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: Energy(0.0), "share=0.0"),
        (lambda: Energy(1.1), "share=1.1"),
        (lambda: Budget(12), "multiples of 8"),
        (lambda: Budget(8, least=16), "mean=8 is out of range; allowed: multiples of 8 from 16 on"),
        (lambda: Budget(40)([np.ones(32)]), "mean=40 of 1 layers is out of range; allowed: in all layers 32"),
    ],
)
def test_bad_input_is_refused(build, sentence):
    with pytest.raises(BadInput, match=sentence):
        build()
