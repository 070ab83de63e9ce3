"""Claims about HumanEval: the reference solution is what is measured, after the prompt to the letter."""

import gzip
import json

import pytest

from kvx.errors import BadInput
from tests.eval.tasks.files.written import lines, made, prompt, score

ROW = {
    "task_id": "HumanEval/0", "prompt": 'def two():\n    """Give 2."""\n', "canonical_solution": "    return 2\n",
    "test": "raise SystemExit", "entry_point": "two",
}  # fmt: skip


@pytest.mark.parametrize("name", ["HumanEval.jsonl", "HumanEval.jsonl.gz"])
def test_the_solution_follows_the_prompt(tmp_path, name):
    text = json.dumps(ROW).encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    (sample,) = made("humaneval", path=str(tmp_path))
    (question,) = sample.questions
    assert prompt(sample) == ROW["prompt"] and question.text == '    """Give 2."""\n'
    assert question.kind == "likelihood" and question.answers == (ROW["canonical_solution"],) and sample.plain
    assert score("humaneval", sample, ROW["canonical_solution"]) == 1 and score("humaneval", sample, "") == 0


@pytest.mark.parametrize("fields", [{"prompt": "def two():\n"}, {"canonical_solution": "\n"}, {"prompt": None}])
def test_a_broken_record_is_refused_by_its_line(tmp_path, fields):
    with pytest.raises(BadInput, match=rf"HumanEval\.jsonl:2: '{next(iter(fields))}'"):
        made("humaneval", path=lines(tmp_path / "HumanEval.jsonl", ROW, {**ROW, **fields}))


def test_a_prompt_that_does_not_fit_is_refused(tmp_path):
    with pytest.raises(BadInput, match=r":1 makes a prompt of 29 tokens with length=28"):
        made("humaneval", 28, path=lines(tmp_path / "h.jsonl", ROW))
