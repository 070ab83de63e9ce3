"""Claims about the comparison: every policy gets every number, bytes are those of the caches, files are whole."""

import io
import json
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import kvx
from kvx.errors import BadInput
from kvx.eval.compare import DEFAULTS, Workload, checked_out, compare_policies, default_policies
from kvx.eval.comparison import print_results
from kvx.eval.cost.cache_bytes import as_bfloat16
from kvx.eval.frontier_plot import frontier
from kvx.eval.records import RECORDS, Record, read
from kvx.prose import prose
from tests.eval.letters import Letters
from tests.tiny import model, prompts

SMALL = Workload(
    passkey=((320, 2), (384, 1)),
    documents=2,
    prompt=96,
    forced=16,
    calibration=(2, 64),
    timed_length=320,
)
POLICIES = ("snapkv(budget=80)", "q_filters(budget=80)", "kivi(bits=2)")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    policies = [kvx.parse_policy(text) for text in POLICIES]
    console, out = Console(file=io.StringIO()), tmp_path_factory.mktemp("compare")
    return compare_policies((model(), Letters()), policies, prose(), SMALL, out=out, console=console)


def test_every_policy_has_every_number_and_the_full_cache_comes_first(results):
    assert [row.policy for row in results.policies] == ["full", *POLICIES]
    for row in results.policies:
        assert np.isfinite([row.perplexity, row.prefill_seconds, row.tokens_per_second]).all()
        assert 0 <= row.agnostic <= 1 and 0 <= row.aware <= 1
        assert len(row.answers) == 6 and row.cache_bytes > row.bytes_read * 0.5 > 0
    full = results.policies[0]
    assert full.share_of_full == 1.0 and 1.9 < full.share_of_bf16 < 2.0  # float32, positions stay int32
    assert results.policies[2].policy_bytes == 4 * 2 * 32 * 4


def test_bytes_are_those_of_the_cache_at_the_longest_prompt(results):
    # Room for the question, letter by letter, and its answer, in multiples of 32.
    _, cache = kvx.prefill(model(), prompts(384)[0], kvx.policies.snapkv(budget=80), max_new_tokens=96)
    row = results.policies[1]
    assert row.cache_bytes == cache.nbytes and row.policy == "snapkv(budget=80)"


def test_a_bfloat16_cache_takes_what_the_share_is_counted_against():
    tokens = prompts(64)[0]
    _, cache = kvx.prefill(model(), tokens, kvx.policies.full())
    _, half = kvx.prefill(model(), tokens, kvx.policies.full(), cache_dtype=jnp.bfloat16)
    assert as_bfloat16(cache) <= half.nbytes <= 1.01 * as_bfloat16(cache)  # the rotation's frequencies stay float32


def test_results_are_written_whole_and_name_what_made_them(results, tmp_path):
    results.write(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["frontier.png", "results.json"]
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {"kvx", "jax", "python"} <= set(content["versions"]) and content["seed"] == 0
    assert content["text"]["sha256"] == prose().sha256 and content["command"]
    assert (tmp_path / "out" / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_shows_every_policy_and_the_json_reads_back(results, capsys):
    print_results(results, timings=True)
    shown = capsys.readouterr().out
    assert all(text in shown for text in POLICIES) and "passkeys and documents" in shown
    print_results(results, as_json=True)
    assert len(json.loads(capsys.readouterr().out)["policies"]) == 4


def test_a_results_folder_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(BadInput, match="cannot be written"):
            checked_out(folder)
    assert checked_out(tmp_path / "new" / "newer") == tmp_path / "new" / "newer"
    assert not (tmp_path / "new").exists()


def test_a_policy_given_twice_is_refused(tmp_path):
    with pytest.raises(BadInput, match="given twice"):
        compare_policies((model(), Letters()), [kvx.policies.full()] * 2, prose(), SMALL, out=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_comparison_is_an_evaluation_and_another_one_replaces_it(tmp_path):
    tiny = replace(SMALL, passkey=((320, 2),))
    console = Console(file=io.StringIO())
    for policy in ("knorm(budget=80)", "streaming_llm(budget=64)"):
        compare_policies((model(), Letters()), [kvx.parse_policy(policy)], prose(), tiny, out=tmp_path, console=console)
        records = read(tmp_path / RECORDS, Record)
        assert {each.policy for each in records} == {"full", policy}
        assert len(records) == 2 * (2 * 2 + 2), "two prompts in two modes, two documents"
        assert (tmp_path / "report.html").exists() and (tmp_path / "summary.csv").exists()


def test_the_default_list_has_the_full_cache_and_ten_more():
    assert len(default_policies()) == len(DEFAULTS) >= 11 and DEFAULTS[0] == "full"


def test_the_frontier_holds_what_nothing_beats_in_both():
    points = [(1.0, 10.0, "full"), (0.5, 12.0, "a"), (0.5, 13.0, "b"), (0.2, 11.0, "c"), (0.1, 30.0, "d")]
    assert [name for _, _, name in frontier(points, lower_is_better=True)] == ["d", "c", "full"]
    assert [name for _, _, name in frontier(points, lower_is_better=False)] == ["d"]
