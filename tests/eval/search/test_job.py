"""Claims about a search's settings: bad ones are refused before any work, and each belongs to an evaluation."""

import pytest

from kvx.errors import BadInput
from kvx.eval.search.job import SearchJob
from kvx.section_file import section_from


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"task": "paskey"}, "did you mean 'passkey'"),
        ({"max_bytes_per_token": 0.0}, "max_bytes_per_token"),
        ({"max_bytes_per_token": float("nan")}, "max_bytes_per_token"),
        ({"samples": 0}, "samples"),
        ({"trials": 0}, "trials"),
        ({"mode": "awake"}, "mode"),
        ({"task": "passkey", "options": {"digits": 3}}, "option"),
        ({"task": "fidelity", "mode": "aware"}, "neither options nor modes"),
    ],
)
def test_what_cannot_be_is_refused_when_the_job_is_made(values, told):
    with pytest.raises(BadInput, match=told):
        section_from(SearchJob, {"max_bytes_per_token": 100.0, **values})


def test_its_evaluation_has_the_same_samples():
    job = SearchJob(100.0, task="key_value", length=512, samples=8, options={"digits": 6}, seed=3, chat=True)
    evaluation = job.evaluation(["full", "kivi"])
    (task,) = evaluation.tasks
    assert (task.text, task.lengths, task.samples, task.modes) == ("key_value(digits=6)", (512,), 8, ("agnostic",))
    assert evaluation.seed == 3 and evaluation.chat and evaluation.policies == ("full", "kivi")


def test_searches_that_differ_in_what_is_searched_belong_to_one_evaluation():
    one, other = (
        SearchJob(limit, trials=trials, only=only) for limit, trials, only in ((9.0, 4, ()), (8.0, 5, ("kivi",)))
    )
    assert one.evaluation() == other.evaluation()


def test_a_search_along_documents_divides_by_all_tokens_that_were_seen():
    job = SearchJob(100.0, task="fidelity", length=256, forced=64, samples=8)
    assert job.evaluation().fidelity.documents == 8 and not job.evaluation().tasks
    assert job.on_documents
