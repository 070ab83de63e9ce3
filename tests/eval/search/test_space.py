"""Claims about the space: it is the registry's, every point is a policy or refused by kvx, papers' values are in it."""

import inspect

import numpy as np
import pytest

import kvx
from kvx.errors import BadInput
from kvx.eval.search.ranges import RANGES, SHARES
from kvx.eval.search.space import Space
from kvx.policies.registry import find, names


def drawn(space, count, seed=0):
    random = np.random.default_rng(seed)
    return [space.draw(lambda _, grid: grid.values[random.integers(len(grid.values))]) for _ in range(count)]


def test_every_sampled_text_is_a_policy_or_refused_in_a_sentence():
    refused = 0
    for text in drawn(Space.of(), 500):
        try:
            assert kvx.parse_policy(text).text == text
        except BadInput as error:
            refused += 1
            assert "allowed" in str(error)
    assert 0 < refused < 250


def test_all_methods_of_the_registry_are_in_it_or_left_out_with_a_reason():
    space = Space.of()
    found = {method.name for method in space.methods}
    assert found | space.left_out.keys() == set(names()) - {"full"}


def test_methods_that_store_come_last_and_lone_ones_are_drawn_alone():
    space = Space.of()
    assert {"snapkv", "h2o", "knorm"} <= {method.name for method in space.selections}
    assert {"kivi", "quest", "mikv"} <= {method.name for method in space.stores}
    lone = {method.name for method in space.methods if method.alone}
    for text in drawn(space, 300):
        assert not any(text.startswith(name + "(") and "+" in text for name in lone)


def test_a_method_alone_has_its_papers_values_and_the_largest_share_that_is_allowed():
    space = Space.of(only=("snapkv", "kivi"))
    snapkv, kivi = space.methods
    assert space.at(space.point(snapkv, share=0.3)) == "snapkv(budget=0.25)"
    assert space.at(space.point(snapkv, share=0.001)) == f"snapkv(budget={SHARES.values[0]})"
    assert space.at(space.point(kivi, share=0.3)) == "kivi"
    assert space.at(space.point(kivi)) == "kivi(group=16, residual=32)"
    assert space.at(space.point(snapkv, kivi, share=0.3)) == "snapkv(budget=0.25)+kivi"
    assert space.at(space.point()) == "full"


def test_values_alone_and_in_a_chain_are_asked_for_apart():
    space = Space.of(only=("snapkv", "tova", "kivi"))
    snapkv, tova, kivi = space.methods
    alone, chained = (set(space.point(*methods)) for methods in ((kivi,), (snapkv, kivi)))
    assert alone & chained == {"selection", "store"}
    # Methods of one role share what they call alike: the budget is one question, whichever is chosen.
    shared = set(space.point(snapkv)) & set(space.point(tova))
    assert len(shared) == 3 and any("budget" in name for name in shared)


def test_every_method_alone_with_its_papers_values_is_a_policy():
    space = Space.of()
    for method in space.methods:
        assert kvx.parse_policy(space.at(space.point(method, share=0.25))).stages


def test_a_row_is_used_by_those_methods_alone_whose_default_it_holds():
    space = Space.of()
    for method in space.methods:
        for name, (key, grid) in method.parameters.items():
            default = inspect.signature(find(method.name)).parameters[name].default
            assert RANGES[key] is grid
            assert default is inspect.Parameter.empty or grid.index(default) is not None
    hashevict = next(method for method in space.methods if method.name == "hashevict")
    assert "bits" not in hashevict.parameters  # there it is the length of a code


def test_one_is_not_one_point_nought_and_true_is_neither():
    grid = RANGES["window", int]
    assert grid.index(64) == 3 and grid.index(64.0) is None and RANGES["balance", bool].index(1) is None


def test_unknown_names_and_empty_spaces_are_refused():
    with pytest.raises(BadInput, match="did you mean 'snapkv'"):
        Space.of(only=("snapvk",))
    with pytest.raises(BadInput, match="unknown policy"):
        Space.of(without=("nothing",))
    with pytest.raises(BadInput, match="leave no policy"):
        Space.of(only=("snapkv",), without=("snapkv",))


def test_refused_methods_leave_the_space_with_their_reason():
    space = Space.of(only=("snapkv", "kivi", "less")).but({"less": "less is not trained"})
    assert [method.name for method in space.methods] == ["snapkv", "kivi"]
    assert space.left_out == {"less": "less is not trained"}
