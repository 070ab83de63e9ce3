"""Claims about running: every record once, whatever interrupts; the same table at the end; nothing overwritten."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

import kvx
from kvx.errors import BadInput
from kvx.eval import results_folder
from kvx.eval import run as running
from kvx.eval.job import EvalJob, TaskSection
from kvx.eval.records import KEPT, RECORDS, Kept, Record, read
from kvx.eval.results_folder import write_summary
from kvx.eval.run import run
from kvx.eval.summary import as_csv, summary
from kvx.prose import prose
from tests import tiny
from tests.eval.letters import Letters

POLICIES = ("snapkv(budget=0.5)", "streaming_llm(budget=64)", "kivi(bits=2)")


@pytest.fixture(scope="module")
def loaded():
    return {"tiny": (tiny.model(num_hidden_layers=2), Letters())}


def job(folder, **changes) -> EvalJob:
    tasks = (TaskSection("passkey", lengths=(400,), samples=3), TaskSection("key_value", lengths=(300,), samples=2))
    values = {"models": ("tiny",), "policies": POLICIES, "tasks": tasks, "batch": 2, "output": str(folder)}
    return EvalJob("test", **{**values, **changes})


def quietly(job: EvalJob, loaded) -> list[Record]:
    folder = run(job, console=Console(file=io.StringIO()), loaded=loaded)
    return read(folder / RECORDS, Record)


@pytest.fixture(scope="module")
def done(loaded, tmp_path_factory):
    folder = tmp_path_factory.mktemp("done") / "results"
    return folder, quietly(job(folder), loaded)


def test_every_sample_has_one_record_under_every_policy_and_mode(done):
    _, records = done
    keys = {(each.cell, each.policy, each.index) for each in records}
    assert len(keys) == len(records) == (3 + 2) * 2 * 4
    for record in records:
        assert record.cache_bytes > 0 and len(record.answers) == len(record.scores) == 1
        assert record.tokens <= record.cell.length and record.seconds["decode"] > 0


def test_policies_of_a_cell_see_the_same_prompts_and_the_full_cache_keeps_all_evidence(done):
    _, records = done
    for record in records:
        same = {each.sha256 for each in records if (each.cell, each.index) == (record.cell, record.index)}
        assert len(same) == 1
        if record.policy in ("full", "kivi(bits=2)"):
            assert record.retention == 1.0
    assert all(0.9 < each.share / 2 < 1.3 for each in records if each.policy == "full"), "float32, of a bf16 cache"
    assert any(each.retention < 1 for each in records if each.policy == POLICIES[1])


def test_an_answer_is_what_generating_alone_gives(done, loaded):
    """Batching, padding and the shared pass change nothing."""
    from kvx.eval.prompts import Frame
    from kvx.eval.tasks.registry import find
    from kvx.eval.tasks.source import Source
    from kvx.prose import prose

    decoder, tokenizer = loaded["tiny"]
    sample = find("passkey").make(Source(tokenizer, prose(), Frame()), 400, 3, 0)[1]
    context = tokenizer.encode(sample.context)
    asked = tokenizer.encode(sample.questions[0].text + sample.questions[0].prefix)
    for text in ("full", "snapkv(budget=0.5)"):
        policy = kvx.parse_policy(text)
        _, cache = kvx.prefill(decoder, np.asarray([context]), policy, max_new_tokens=len(asked) + 10)
        result = kvx.generate(decoder, np.asarray([asked]), policy=policy, cache=cache, max_new_tokens=10, stop=[14])
        alone = tokenizer.decode([token for token in result.tokens[0].tolist() if token >= 0])
        found = next(
            each for each in done[1]
            if each.cell.task == "passkey" and each.cell.mode == "agnostic" and each.policy == text and each.index == 1
        )  # fmt: skip
        assert alone.startswith(found.answers[0])
        assert alone[len(found.answers[0]) :][:1] in ("", ".", "\n"), "cut where it ends"


def test_what_was_interrupted_goes_on_where_it_stopped_and_ends_in_the_same_table(done, loaded, tmp_path, monkeypatch):
    whole, append = done[1], running.append
    left = [3]

    def failing(path, lines):
        if left[0] == 0:
            append(path, lines)
            with path.open("ab") as file:
                file.write(b'{"cell": {"model": "ti')  # killed while it wrote
            raise KeyboardInterrupt
        left[0] -= 1
        append(path, lines)

    monkeypatch.setattr(running, "append", failing)
    with pytest.raises(KeyboardInterrupt):
        quietly(job(tmp_path / "out"), loaded)
    monkeypatch.setattr(running, "append", append)
    first = read(tmp_path / "out" / RECORDS, Record)
    assert 0 < len(first) < len(whole)
    asked = []
    answer = running.answer
    monkeypatch.setattr(running, "answer", lambda *given, **more: asked.append(len(given[4])) or answer(*given, **more))
    records = quietly(job(tmp_path / "out"), loaded)
    assert records[: len(first)] == first and len(records) == len(whole)
    assert sum(asked) < 6 * 4, "batches that were finished under a policy are not run again"
    strip = [line for line in as_csv(summary(whole)).splitlines()]
    assert strip == as_csv(summary(records)).splitlines() == (tmp_path / "out/summary.csv").read_text().splitlines()


def test_a_finished_job_runs_nothing(done, loaded, monkeypatch):
    folder, records = done
    monkeypatch.setattr(running, "answer", lambda *given, **more: pytest.fail("it ran"))
    assert quietly(job(folder), loaded) == records


def test_a_folder_of_another_job_or_of_other_files_is_refused_and_nothing_changes(done, loaded, tmp_path):
    folder, _ = done
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(BadInput, match="a job with other seed; allowed"):
        quietly(job(folder, seed=1), loaded)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(BadInput, match="something else"):
        quietly(job(tmp_path), loaded)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_config_of_something_else_is_not_taken_for_results(loaded, tmp_path):
    """A model's folder has a config.json too."""
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "vocab_size": 97}')
    for anew in (False, True):
        with pytest.raises(BadInput, match="holds files of something else"):
            run(job(tmp_path), console=Console(file=io.StringIO()), loaded=loaded, anew=anew)
    with pytest.raises(BadInput, match="holds files of something else"):
        write_summary(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_job_that_cannot_run_takes_no_folder_and_leaves_earlier_results(done, loaded, tmp_path):
    folder, records = done
    with pytest.raises(BadInput, match="unknown model"):
        run(job(tmp_path / "out", models=("smollm2-135m-instruc",)), console=Console(file=io.StringIO()))
    assert not (tmp_path / "out").exists()
    with pytest.raises(BadInput, match="is not trained"):
        run(job(folder, policies=("less(budget=64)",)), console=Console(file=io.StringIO()), loaded=loaded, anew=True)
    assert read(folder / RECORDS, Record) == records
    # Where nothing was measured yet, another job may begin.
    results_folder.claim(job(tmp_path / "begun"), prose())
    results_folder.claim(job(tmp_path / "begun", seed=1), prose())


def test_a_length_that_cannot_hold_the_task_is_refused_before_any_work(loaded, tmp_path):
    tasks = (TaskSection("passkey", lengths=(100,), samples=1),)
    with pytest.raises(BadInput, match="length=100 is too short for task=passkey; allowed: at least"):
        quietly(job(tmp_path / "out", tasks=tasks), loaded)


def test_maps_tell_what_was_kept_of_the_first_prompt(done):
    maps = {(each.cell.task, each.cell.mode, each.policy): each for each in read(done[0] / KEPT, Kept)}
    assert len(maps) == 2 * 2 * 4
    full = maps["passkey", "agnostic", "full"]
    assert full.mask.all() and full.shape == (2, *full.mask.shape[1:]) and "".join(full.text).startswith("There is a")
    half = maps["passkey", "agnostic", "snapkv(budget=0.5)"]
    assert half.mask.sum(axis=2).tolist() == [list(row) for row in half.counts] and 0.4 < half.mask.mean() < 0.6


def test_the_config_names_what_made_the_results(done):
    content = json.loads((done[0] / "config.json").read_text())
    assert content["seed"] == 0 and content["name"] == "test" and content["prose"]["sha256"]
    assert {"jax", "kvx"} <= set(content["versions"]) and content["command"] and content["device"]["count"] >= 1
