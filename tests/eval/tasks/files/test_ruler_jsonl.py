"""Claims about RULER's files: questions and prefixes as they stand there, lengths respected, gold scores 1."""

import pytest

from kvx.errors import BadInput
from kvx.eval.tasks.files.ruler_jsonl import FAMILIES
from tests.eval.tasks.files.written import lines, made, prompt, score

NAMES = sorted(name for family in FAMILIES for name in family.names)
ROW = {
    "index": 0, "input": "Memorize it.\nSome text.\nQuestion: which?  ", "outputs": ["Abc", "def"], "length": 50,
    "answer_prefix": " The answer is",
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_all_gold_texts_score_1_and_none_0(tmp_path, name):
    lines(tmp_path / name / "validation.jsonl", ROW)
    (sample,) = made(f"ruler_jsonl/{name}", path=str(tmp_path))
    assert score(f"ruler_jsonl/{name}", sample, "abc, DEF") == 1
    assert score(f"ruler_jsonl/{name}", sample, "abc") == (1 if name.startswith("qa") else 0.5)
    assert score(f"ruler_jsonl/{name}", sample, "") == 0
    assert prompt(sample) == ROW["input"] and sample.questions[0].text == "\nQuestion: which?  "
    assert sample.questions[0].prefix == " The answer is"


def test_there_are_13_tasks():
    assert len(NAMES) == 13


def test_files_without_a_prefix_are_older_ones(tmp_path):
    (sample,) = made("ruler_jsonl/vt", path=lines(tmp_path / "vt.jsonl", {"input": "a\nb", "outputs": ["c"]}))
    assert sample.questions[0].prefix == ""


def test_a_prompt_that_does_not_fit_is_refused_by_its_line(tmp_path):
    path = lines(tmp_path / "vt.jsonl", {"input": "a\nb", "outputs": ["c"]}, ROW)
    tokens = len(ROW["input"]) + len(ROW["answer_prefix"])
    assert len(made("ruler_jsonl/vt", tokens, path=path)) == 2
    with pytest.raises(BadInput, match=rf"vt\.jsonl:2 makes a prompt of {tokens} tokens"):
        made("ruler_jsonl/vt", tokens - 1, path=path)


@pytest.mark.parametrize("fields", [{"input": "one line\n"}, {"outputs": []}, {"answer_prefix": 3}])
def test_a_broken_record_is_refused_by_its_line(tmp_path, fields):
    with pytest.raises(BadInput, match=rf"vt\.jsonl:1: '{next(iter(fields))}'"):
        made("ruler_jsonl/vt", path=lines(tmp_path / "vt.jsonl", {**ROW, **fields}))
