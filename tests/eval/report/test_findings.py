"""Claims about findings: the smallest cache within the full cache's interval is named, whichever way is better."""

import pytest

from kvx.eval.records import Cell
from kvx.eval.report.findings import findings
from kvx.eval.statistics import Interval
from kvx.eval.summary import Row


def row(
    policy: str, score: float, share: float, *, task="passkey", mode="aware", read=None, lower=False, room=0.1
) -> Row:
    """One whose interval reaches `room` to both sides."""
    interval = Interval(score, score - room, score + room, 50)
    stored = int(1000 * share)
    difference = None if policy == "full" else Interval(0.0, -1.0, 1.0, 50)
    return Row(
        cell=Cell("model", task, 2048, mode), policy=policy, score=interval, share=share, cache_bytes=stored,
        bytes_read=stored if read is None else int(1000 * read), policy_bytes=0, retention=None, difference=difference,
        lower_is_better=lower, measures={},
    )  # fmt: skip


def test_the_smallest_cache_within_the_interval_is_named_with_both_scores():
    rows = [row("full", 0.9, 1.0), row("a(1)", 0.85, 0.5), row("a(2)", 0.81, 0.25), row("a(3)", 0.79, 0.125)]
    (found,) = findings(rows)
    assert found.subject == "passkey"
    assert found.sentence == (
        "2048 tokens, question seen: a(2) with 25 %, 0.81 against the full cache's 0.9 [0.8, 1] (50 samples)."
    )


def test_a_score_beyond_the_better_end_is_as_good():
    (found,) = findings([row("full", 0.5, 1.0), row("a(1)", 0.9, 0.5)])
    assert "a(1) with 50 %" in found.sentence


def test_where_lower_is_better_the_interval_is_left_upwards():
    rows = [row("full", 0.5, 1.0, lower=True), row("a(1)", 0.55, 0.5, lower=True), row("a(2)", 0.7, 0.2, lower=True)]
    (found,) = findings(rows)
    assert "a(1) with 50 %" in found.sentence


@pytest.mark.parametrize(("lower", "near", "far"), [(False, 0.7, 0.2), (True, 1.1, 1.9)])
def test_the_nearest_is_named_where_none_is_as_good(lower, near, far):
    rows = [row("full", 0.9, 1.0, lower=lower), row("a(1)", far, 0.5, lower=lower), row("a(2)", near, 0.4, lower=lower)]
    (found,) = findings(rows)
    assert "no smaller cache is as good" in found.sentence and "nearest is a(2) with 40 %" in found.sentence


def test_what_keeps_as_much_as_the_full_cache_is_no_smaller_cache():
    assert findings([row("full", 0.9, 1.0), row("a(1)", 0.9, 1.1, read=0.1)]) == []


def test_over_all_cells_only_what_is_as_good_in_each_of_them_counts():
    rows = [
        *(row("full", 0.9, 1.0, mode=mode) for mode in ("agnostic", "aware")),
        row("a(1)", 0.9, 0.2, mode="aware"), row("a(1)", 0.1, 0.2, mode="agnostic"),
        row("a(2)", 0.9, 0.3, mode="aware"), row("a(2)", 0.9, 0.5, mode="agnostic"),
        row("b(1)", 0.9, 1.2, mode="aware", read=0.1), row("b(1)", 0.9, 1.2, mode="agnostic", read=0.1),
    ]  # fmt: skip
    first, second, *others = findings(rows)
    assert first.subject == second.subject == "model" and len(others) == 2
    assert first.sentence.startswith("a(2) is the smallest as good in all 2") and "40 % of the bytes" in first.sentence
    assert second.sentence.startswith("b(1) is as good") and "keeps 120 % and reads 10 %" in second.sentence


def test_a_policy_that_misses_a_cell_is_not_said_to_be_good_everywhere():
    rows = [*(row("full", 0.9, 1.0, mode=mode) for mode in ("agnostic", "aware")), row("a(1)", 0.9, 0.2, mode="aware")]
    assert findings(rows)[0].sentence.startswith("No smaller cache is as good in all 2")


def test_without_the_full_cache_nothing_is_found():
    assert findings([row("a(1)", 0.9, 0.5)]) == [] and findings([]) == []


def test_a_policy_that_names_a_thousand_heads_is_shortened():
    heads = f"razor_attention(heads=({', '.join(map(str, range(1000)))}))"
    (found,) = findings([row("full", 0.9, 1.0), row(heads, 0.9, 0.5)])
    assert "razor_attention heads=(0, 1" in found.sentence and len(found.sentence) < 200
