"""Claims about names: a family is its methods, a label its methods with their numbers, and any text has both."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvx.eval.report.policy_names import LONGEST, family, label


@pytest.mark.parametrize(
    ("policy", "its_family", "its_label"),
    [
        ("full", "full", "full"),
        ("snapkv(budget=0.25)", "snapkv", "snapkv 0.25"),
        ("snapkv(budget=256, window=16)+kivi(bits=4)", "snapkv+kivi", "snapkv 256, window=16 + kivi bits=4"),
        ("a(x=(1, 2))+b(s='+(')", "a+b", "a x=(1, 2) + b s='+('"),
    ],
)
def test_names_are_short_for_policies(policy, its_family, its_label):
    assert (family(policy), label(policy)) == (its_family, its_label)


def test_only_parameters_tell_policies_of_a_family_apart():
    assert family("h2o(budget=1)") == family("h2o(budget=2, recent=0.5)") != family("h2o(budget=1)+kivi(bits=2)")


@given(st.text(max_size=200))
def test_any_text_has_short_names(text):
    assert len(family(text)) <= LONGEST and len(label(text)) <= LONGEST
