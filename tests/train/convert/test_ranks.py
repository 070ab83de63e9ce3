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


def ranks_of(rule, found):
    """Where every layer of the model is converted."""
    return rule(found, range(len(found)), len(found))


@settings(max_examples=20, deadline=None)
@given(spectra, st.floats(0.05, 0.999))
def test_energy_is_the_paper_s_count_rounded_up(found, share):
    for spectrum, rank in zip(found, ranks_of(Energy(share), found), strict=True):
        cumulative = np.cumsum(spectrum**2) / np.sum(spectrum**2)
        count = max(1, int(np.sum(cumulative <= share * (1 + 1e-12))))
        assert rank == min(rounded_up(count, 8), len(spectrum))


def test_energy_by_hand():
    """Of 20 equal terms, shares of k / 20: half of the energy is 10 of them, just less is 9, both up to 16; 8 are 8."""
    flat, short = np.ones(20), np.sqrt(np.asarray([5.0, 3.0, 2.0]))
    assert [ranks_of(Energy(share), [flat])[0] for share in (0.5, 0.49, 0.4, 0.39)] == [16, 16, 8, 8]
    assert ranks_of(Energy(0.01), [flat]) == (8,), "at least one, rounded up"
    assert ranks_of(Energy(0.45), [flat]) == (16,) and ranks_of(Energy(0.44), [flat]) == (8,), "9 terms and 8"
    assert ranks_of(Energy(0.1), [short]) == (3,), "no more than there are"


def test_zeros_are_never_counted():
    """A stack of 2 G D rows in a wider model has no more terms, whatever rounding makes of the rest."""
    spectrum = np.concatenate([np.linspace(3, 1, 10), np.full(20, 1e-15)])
    assert ranks_of(Energy(1.0), [spectrum]) == (10,)


@pytest.mark.parametrize(
    ("layers", "ranks"),
    [((0, 1, 2, 3), (4, 24, 24, 4)), ((1, 2), (24, 24)), ((2,), (24,)), ((0, 2), (4, 24)), ((3,), (4,))],
)
def test_the_model_s_ends_may_be_fixed(layers, ranks):
    """Not those of the converted layers: a hybrid's energy counts in every layer between."""
    assert Energy(0.5, ends=4)([np.ones(40)] * len(layers), layers, 4) == ranks


@settings(max_examples=20, deadline=None)
@given(spectra, st.sampled_from([8, 16, 24]))
def test_a_budget_conserves_its_total(found, mean):
    ranks = ranks_of(Budget(mean), found)
    assert sum(ranks) == mean * len(found)
    assert all(rank % 8 == 0 and 8 <= rank <= len(spectrum) for rank, spectrum in zip(ranks, found, strict=True))


def test_a_budget_goes_where_the_energy_is():
    steep, flat = np.asarray([10.0] * 8 + [0.1] * 24), np.ones(32)
    assert ranks_of(Budget(16), [steep, flat]) == (8, 24)


def test_no_other_split_of_the_budget_keeps_more():
    random = np.random.default_rng(0)
    found = [np.sort(random.random(32))[::-1] for _ in range(2)]
    ranks = ranks_of(Budget(16), found)

    def kept(ranks):
        shares = [np.cumsum(spectrum**2) / np.sum(spectrum**2) for spectrum in found]
        return sum(share[rank - 1] for share, rank in zip(shares, ranks, strict=True))

    assert all(kept(ranks) >= kept((first, 32 - first)) for first in (8, 16, 24))


def test_equal_layers_get_equal_ranks():
    flat = np.ones(64)
    assert ranks_of(Budget(24), [flat] * 4) == ranks_of(Fixed(24), [flat] * 4) == (24,) * 4


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: Energy(0.0), "share=0.0"),
        (lambda: Energy(1.1), "share=1.1"),
        (lambda: Budget(12), "multiples of 8"),
        (lambda: Budget(8, least=16), "mean=8 is out of range; allowed: multiples of 8 from 16 on"),
        (lambda: ranks_of(Budget(40), [np.ones(32)]), "mean=40 of 1 layers is out of range; allowed: in all layers 32"),
    ],
)
def test_bad_input_is_refused(build, sentence):
    with pytest.raises(BadInput, match=sentence):
        build()
