"""Claims about a whole search with a small model: files, resuming, limits, and the words of the command line."""

import io
import json

import pytest
from rich.console import Console

from kvx.cli import app, run
from kvx.errors import BadInput
from kvx.eval.job import EvalJob
from kvx.eval.records import RECORDS, Record, read
from kvx.eval.search.benches import bench_of
from kvx.eval.search.findings import table, told
from kvx.eval.search.job import SearchJob
from kvx.eval.search.run import run_search
from kvx.prose import prose
from kvx.section_file import read_section
from tests.eval.letters import Letters
from tests.tiny import model

LIMIT = 1500.0
"""Bytes a token. The tiny model's full cache has 4 layers x 2 heads x (2 x 32 floats and a position), and room."""


def job(folder, **values):
    given = {"length": 320, "samples": 4, "trials": 3, "batch": 2, "only": ("knorm", "tova")}
    return SearchJob(LIMIT, output=str(folder), **{**given, **values})


def searched(job):
    return run_search(job, console=Console(file=io.StringIO()), loaded=(model(), Letters()))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search") / "out"
    return folder, *searched(job(folder))


def test_the_folder_holds_records_the_frontier_as_a_job_and_a_picture(done):
    folder, found, _ = done
    assert {path.name for path in folder.iterdir()} == {
        "config.json", RECORDS, "search.json", "frontier.toml", "frontier.png"
    }  # fmt: skip
    assert (folder / "frontier.png").read_bytes().startswith(b"\x89PNG")
    evaluation = read_section(EvalJob, folder / "frontier.toml")
    texts = [policy.text for policy in evaluation.chosen()]
    assert texts == ["full", *(point.name for point in found.frontier)]
    assert evaluation.tasks[0].samples == 4 and evaluation.name == "passkey_frontier"


def test_bytes_are_those_of_the_caches_and_none_of_a_candidate_exceeds_the_limit(done):
    folder, found, _ = done
    records = read(folder / RECORDS, Record)
    for record in records:
        assert record.policy == "full" or record.cache_bytes / 320 <= LIMIT
        assert found.sized[record.policy] >= record.cache_bytes / 320
    assert len(found.run) == 3 and found.counts[-1] == 4
    assert {record.index for record in records if record.policy == "full"} == set(range(4))


def test_planned_sizes_are_the_measured_ones(done):
    folder, found, _ = done
    bench = bench_of(job(folder), model(), Letters(), prose())
    assert dict(bench.sizes([*found.run, "full"])) == {text: found.sized[text] for text in (*found.run, "full")}
    assert found.sized["full"] > LIMIT


def test_all_candidates_saw_the_same_prompts(done):
    records = read(done[0] / RECORDS, Record)
    prompts = {}
    for record in records:
        prompts.setdefault(record.index, set()).add(record.sha256)
    assert len(prompts) == 4 and all(len(each) == 1 for each in prompts.values())


def test_what_is_found_is_told_with_intervals_and_counts(done):
    folder, found, rows = done
    shown = io.StringIO()
    Console(file=shown, width=150).print(table(found, rows))
    assert "full" in shown.getvalue() and all(point.name in shown.getvalue() for point in found.frontier)
    assert rows["full"].score.count == 4 and "3 were run" in told(found)[0]
    content = json.loads((folder / "search.json").read_text())
    assert [each["policy"] for each in content["frontier"]] == [point.name for point in found.frontier]
    assert content["job"]["max_bytes_per_token"] == LIMIT and "jax" in content["versions"]
    assert all(size > LIMIT for size in content["too_large"].values())


def test_begun_again_it_runs_nothing_and_ends_in_the_same_files(done, monkeypatch):
    folder, found, _ = done
    before = {name: (folder / name).read_bytes() for name in (RECORDS, "frontier.toml")}
    monkeypatch.setattr("kvx.eval.search.benches.answer", lambda *_, **__: pytest.fail("a sample was run again"))
    again, _ = searched(job(folder))
    assert again.frontier == found.frontier and again.scores == found.scores
    assert {name: (folder / name).read_bytes() for name in before} == before


def test_the_folder_of_other_samples_is_refused_and_left_as_it_is(done):
    folder = done[0]
    before = (folder / RECORDS).read_bytes()
    with pytest.raises(BadInput, match="other seed"):
        searched(job(folder, seed=1))
    assert (folder / RECORDS).read_bytes() == before


def test_a_limit_below_everything_is_refused_without_a_record(tmp_path):
    with pytest.raises(BadInput, match="below the smallest"):
        run_search(
            SearchJob(1.0, length=320, samples=4, only=("knorm",), output=str(tmp_path / "out")),
            console=Console(file=io.StringIO()), loaded=(model(), Letters()),
        )  # fmt: skip
    assert not (tmp_path / "out" / RECORDS).exists()


@pytest.mark.slow
def test_divergence_along_documents_is_searched_too(tmp_path):
    found, rows = searched(
        job(tmp_path / "out", task="fidelity", length=96, forced=8, samples=2, trials=2, only=("knorm", "kivi"))
    )
    assert all(quality <= 0 for scores in found.scores.values() for quality in scores)
    assert found.scores["full"] == pytest.approx([0.0, 0.0], abs=1e-6) and rows["full"].lower_is_better
    assert read_section(EvalJob, tmp_path / "out" / "frontier.toml").fidelity.documents == 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--max-bytes-per-token", "100", "--task", "paskey"], "unknown task 'paskey'"),
        (["--max-bytes-per-token", "100", "--only", "snapvk"], "unknown policy 'snapvk'"),
        (["--max-bytes-per-token", "100", "--without", "none"], "unknown policy 'none'"),
        (["--max-bytes-per-token", "-1"], "max_bytes_per_token=-1.0"),
        (["--max-bytes-per-token", "100", "--option", "digits"], "key=value"),
        ([], "Missing option"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(arguments, told, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        run(app, "kvx", ["search", *arguments])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and told in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())
