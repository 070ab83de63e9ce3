"""Claims about the roofline: the published example of a 34B model on an A100, limits, and what never rises or falls."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvx.eval.plan.chips import CHIPS, GIB, Chip, find_chip
from kvx.eval.plan.roofline import (
    Load,
    Machine,
    fits,
    prefill_seconds,
    session_rate,
    step_seconds,
    switch_seconds,
    users,
)

A100 = Chip("A100", 312e12, 80 * GIB, 2.039e12, 20e9)
LAYERS, HEADS, KV_HEADS, DIM, PARAMETERS = 60, 56, 8, 128, 34e9
TOKENS = st.integers(128, 1_000_000)


def kv(tokens: int) -> int:
    """Bytes of one user's bfloat16 cache."""
    return 2 * LAYERS * KV_HEADS * DIM * tokens * 2


def load(tokens: int, chips: int = 1, kappa: float = 1.0, rho: float = 1.0, phi: float = 1.0) -> Load:
    """The example, under a method that stores, reads and computes these fractions."""
    flops = 2 * PARAMETERS * tokens + 2 * LAYERS * HEADS * DIM * tokens**2
    row, weights = int(kappa * kv(tokens) / chips), int(2 * PARAMETERS / chips)
    return Load(weights, weights, lambda rows: rows * row, rho / kappa, row, phi * flops, 2 * PARAMETERS)


ONE, TWO = Machine(A100), Machine(A100, 2)


def test_published_figures_of_the_34b_example():
    # Recomputed from the formulas; the paper prints 9.8 and 8.5 s, about 20 and 1 users, and prefill seconds that count
    # half of causal attention.
    assert [kv(tokens) / GIB for tokens in (4_000, 50_000, 100_000, 1_000_000)] == pytest.approx(
        [0.916, 11.44, 22.89, 228.9], rel=0.01
    )
    assert 250 * step_seconds(load(4_000), ONE) == pytest.approx(8.46, rel=0.01)
    assert 250 * step_seconds(load(50_000), ONE) == pytest.approx(9.84, rel=0.01)
    assert prefill_seconds(load(50_000), ONE) == pytest.approx(17.8, rel=0.01)
    assert (users(load(4_000), ONE), users(load(50_000), ONE)) == (18, 1)
    assert (users(load(4_000, 2), TWO), users(load(100_000, 2), TWO)) == (105, 4)
    assert switch_seconds(load(50_000), ONE) == pytest.approx(1.23, rel=0.01)
    assert switch_seconds(load(4_000), ONE) == pytest.approx(0.098, rel=0.01)
    assert A100.ridge == pytest.approx(153, rel=0.01)


def test_a_gigabyte_is_not_a_gibibyte():
    assert users(load(4_000), Machine(replace(A100, memory=80 * 10**9))) == 12
    assert users(load(50_000), Machine(replace(A100, memory=80 * 10**9))) == 0 != users(load(50_000), ONE)


@given(TOKENS, st.integers(1, 8))
def test_as_many_users_as_fit_and_not_one_more(tokens, chips):
    asked, machine = load(tokens, chips), Machine(A100, chips)
    found, free = users(asked, machine), A100.memory - asked.weights
    assert found * asked.user <= free < (found + 1) * asked.user
    assert fits(asked, machine, found) and not fits(asked, machine, found + 1)


@given(TOKENS, TOKENS)
def test_longer_prompts_never_cost_less_and_never_let_more_users_in(one, other):
    short, long = (load(tokens) for tokens in sorted((one, other)))
    for cost in (prefill_seconds, step_seconds):
        assert cost(short, ONE) <= cost(long, ONE)
    assert switch_seconds(short, ONE) <= switch_seconds(long, ONE)
    assert users(short, ONE) >= users(long, ONE)
    assert session_rate(short, ONE, 4, 5, 250) >= session_rate(long, ONE, 4, 5, 250)


def test_a_method_changes_only_the_metrics_that_it_touches():
    plain = load(50_000)
    sparse = load(50_000, rho=0.1)  # reads less, stores all
    evicting = load(50_000, kappa=0.1, rho=0.1)
    cheap = load(50_000, phi=0.5)
    assert step_seconds(sparse, ONE) < step_seconds(plain, ONE) and users(sparse, ONE) == users(plain, ONE)
    assert switch_seconds(sparse, ONE) == switch_seconds(plain, ONE)
    assert users(evicting, ONE) >= 10 * users(plain, ONE)
    assert switch_seconds(evicting, ONE) == pytest.approx(switch_seconds(plain, ONE) / 10, rel=1e-6)
    assert step_seconds(evicting, ONE) == pytest.approx(step_seconds(sparse, ONE), rel=1e-6)
    assert prefill_seconds(cheap, ONE) == prefill_seconds(plain, ONE) / 2
    for cost in (prefill_seconds, step_seconds):
        assert cost(load(50_000, kappa=1.0, rho=1.0, phi=1.0), ONE) == cost(plain, ONE)


def test_without_a_cache_a_step_reads_the_weights():
    bare = replace(load(50_000), cache=lambda rows: 0)
    assert 250 * step_seconds(bare, ONE) == pytest.approx(250 * 68e9 / 2.039e12)


def test_large_batches_are_bound_by_arithmetic_beyond_the_ridge():
    bare = replace(load(128), cache=lambda rows: 0)
    below, above = int(A100.ridge), int(A100.ridge) + 1
    assert step_seconds(bare, ONE, below) == step_seconds(bare, ONE, 1) < step_seconds(bare, ONE, above)


def test_two_chips_halve_what_each_one_does():
    one, two = load(50_000), load(50_000, 2)
    for cost in (prefill_seconds, step_seconds):
        assert cost(two, TWO) == pytest.approx(cost(one, ONE) / 2)
    assert switch_seconds(two, TWO) == pytest.approx(switch_seconds(one, ONE) / 2)


def test_sessions_of_users_who_all_fit_and_of_users_who_do_not():
    asked = load(4_000)
    prefill, fitting = prefill_seconds(asked, ONE), users(asked, ONE)
    assert session_rate(asked, ONE, 10, 5, 250) == pytest.approx(
        10 / (10 * prefill + 5 * 250 * step_seconds(asked, ONE, 10))
    )
    assert fitting == 18
    # Twenty users are two groups, and each of them finds the cache swapped out in each of five rounds.
    seconds = 20 * prefill + 5 * 2 * 250 * step_seconds(asked, ONE, 18) + 5 * 20 * switch_seconds(asked, ONE)
    assert session_rate(asked, ONE, 20, 5, 250) == pytest.approx(20 / seconds)
    assert session_rate(load(1_000_000), ONE, 1, 1, 250) == 0.0


def test_a_cache_is_computed_anew_where_that_is_faster_than_the_link():
    slow = Machine(replace(A100, link=1e8))
    asked = load(4_000)
    assert switch_seconds(asked, slow) > prefill_seconds(asked, slow)
    rate = session_rate(asked, slow, 20, 1, 250)
    assert rate == session_rate(asked, Machine(replace(A100, link=1e6)), 20, 1, 250)


def test_chips_are_found_in_any_case_and_have_sensible_peaks():
    assert find_chip("h100") is CHIPS["H100"] and find_chip("V5E") is CHIPS["v5e"]
    for chip in CHIPS.values():
        assert 150 < chip.ridge < 600 and chip.link < chip.bandwidth / 10 and chip.memory % GIB == 0
