"""Claims about policies as text: what `Policy.text` writes is read back, and everything else is refused by column."""

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvx
from kvx.errors import BadInput
from kvx.policies.registry import find, names
from kvx.policy_text import amended, parse_policy

BUDGETS = st.one_of(st.integers(64, 4096), st.floats(1e-6, 1.0, exclude_min=False))
PARAMETERS = {
    "full": {},
    "streaming_llm": {"budget": st.integers(16, 4096), "sinks": st.integers(0, 8)},
    "h2o": {"budget": BUDGETS, "recent": st.floats(0, 1), "average": st.sampled_from(["sum", "mean"])},
    "snapkv": {"budget": BUDGETS, "window": st.integers(1, 64), "pooling": st.sampled_from(["mean", "max"])},
    "knorm": {"budget": BUDGETS, "skip": st.lists(st.integers(-9, 9), max_size=3).map(tuple)},
    "pyramidkv": {"budget": BUDGETS, "table": st.one_of(st.none(), st.tuples(st.integers(1, 9), st.integers(1, 9)))},
    "q_filters": {"budget": BUDGETS, "every_step": st.booleans()},
    "quest": {"budget": BUDGETS, "skip": st.just(())},
    "minicache": {"start": st.floats(0, 1), "gamma": st.one_of(st.none(), st.floats(0, 1))},
    "tidaldecode": {"budget": BUDGETS, "layers": st.one_of(st.none(), st.just((-1, 3))), "group": st.none()},
}


def least(name):
    """A call of a method with the parameters it cannot do without."""
    for parameters in ({}, {"budget": 256}, {"bits": 2}):
        try:
            return find(name)(**parameters)
        except BadInput:
            continue
    raise AssertionError(f"{name} needs an entry of its own in this test")


def equal(first, second):
    """Same structure, static fields and text (arrays: none before calibration)."""
    return jax.tree.structure(first) == jax.tree.structure(second)


@pytest.mark.parametrize("name", names())
def test_every_registered_recipe_reads_back_its_own_text(name):
    policy = least(name)
    assert equal(parse_policy(policy.text), policy)


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_any_parameters_read_back(data):
    name = data.draw(st.sampled_from(sorted(PARAMETERS)))
    parameters = {key: data.draw(values) for key, values in PARAMETERS[name].items()}
    policy = kvx.policy(name, **parameters)
    again = parse_policy(policy.text)
    assert equal(again, policy) and again.text == policy.text


def test_chains_positions_words_and_blanks():
    policy = parse_policy(" snapkv( 256 , pooling = max , ) + quest(\tbudget=64) ")
    expected = kvx.chain(kvx.policies.snapkv(256, pooling="max"), kvx.policies.quest(budget=64))
    assert equal(policy, expected) and policy.text == expected.text
    assert equal(parse_policy("full"), kvx.policies.full())
    assert equal(parse_policy("full()"), kvx.policies.full())


def test_an_int_and_a_float_stay_apart():
    assert not equal(parse_policy("knorm(1)"), parse_policy("knorm(1.0)"))


@pytest.mark.parametrize(
    ("text", "column", "allowed"),
    [
        ("", 1, "the name of a method"),
        ("snapkv(budget=)", 15, "a number"),
        ("snapkv(budget=256", 18, "',' or ')'"),
        ("snapkv(budget=256))", 19, "'+'"),
        ("snapkv(budget=256)+", 20, "the name of a method"),
        ("snapkv(budget=256, budget=12)", 20, "each parameter once"),
        ("snapkv(budget=256, 3)", 20, "name=value"),
        ("snapkv(budget=1.2.3)", 15, "a number"),
        ("snapkv(budget=12x)", 15, "a number"),
        ("snapkv(budget=__import__('os'))", 25, "',' or ')'"),
        ("snapkv(budget=[1])", 15, "a number"),
        ("snapkv(budget='\\x41')", 15, "escapes"),
        ("snapkv(" + "(" * 20, 17, "tuples within"),
    ],
)
def test_errors_name_the_column_and_what_is_allowed(text, column, allowed):
    with pytest.raises(BadInput) as error:
        parse_policy(text)
    assert f"column {column}:" in str(error.value) and allowed in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("snapkw(budget=256)", "did you mean 'snapkv'"),
        ("snapkv(budgett=256)", "did you mean 'budget'"),
        ("snapkv(budget=0)", "budget=0"),
        ("snapkv(budget=-3)", "budget=-3"),
        ("snapkv(budget=nan)", "budget=nan"),
        ("snapkv(budget=1.5)", "budget=1.5"),
        ("snapkv(budget=8)", "protected"),
        ("snapkv", "missing a required argument"),
        ("full(1)", "too many positional arguments"),
        ("x" * 16_001, "at most 16000"),
        ("snapkv(budget=" + "1" * 5000 + ")", "numbers of at most 40 characters"),
        ("snapkv(budget=10000000000000)", "budget=10000000000000 is out of range"),
        ("snapkv(budget=64, window=9999999999)", "allowed: an int from"),
    ],
)
def test_names_and_values_that_methods_refuse(text, words):
    with pytest.raises(BadInput) as error:
        parse_policy(text)
    assert words in str(error.value)


@given(st.text(max_size=40))
@settings(max_examples=300, deadline=None)
def test_any_text_is_a_policy_or_one_refusal(text):
    try:
        policy = parse_policy(text)
    except BadInput as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert isinstance(policy, kvx.Policy)


def test_parameters_are_set_in_the_method_that_made_a_stage():
    """By stage, since several methods of a chain may have parameters of one name, or several stages."""
    assert amended("snapkv(256, window=8)+mikv(64)", 0, {"window": 16}) == "snapkv(budget=256, window=16)+mikv(high=64)"
    assert amended("streaming_llm(8)", 1, {"sinks": 2}) == "streaming_llm(budget=8, sinks=2)"
    assert amended("h2o(256)+mikv(64, heads=max)", 1, {"heads": "sum"}) == "h2o(budget=256)+mikv(high=64, heads='sum')"
    assert amended("snapkv(256)", 0, {}) == "snapkv(256)", "nothing to set"
    assert amended("policy", 0, {"window": 16}) == "policy", "put together by hand"
