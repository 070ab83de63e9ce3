"""Claims about LongBench: prompts to the letter, halves, first lines, and gold answers that score 1."""

import pytest

from kvx.errors import BadInput
from kvx.eval.tasks.files.longbench import MEMBERS, first_line
from kvx.eval.tasks.files.longbench_prompts import NEW_TOKENS, PROMPTS
from tests.eval.tasks.files.written import lines, made, prompt, score

PLAIN = {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}
CHINESE = {"multifieldqa_zh", "dureader", "vcsum"}
"""Those that are scored by segmented words."""

RIGHT = {"passage_count": "3", "passage_retrieval_en": "Paragraph 3", "passage_retrieval_zh": "段落3"}


def record(name, **fields):
    right = RIGHT.get(name, "Other location")
    return {
        "input": "What is {it}?", "context": "A {context} of braces.", "answers": [right, "y 3"], "length": 5,
        "dataset": name, "language": "en", "all_classes": ["location", "Other location", "person"], "_id": "0",
        **fields,
    }  # fmt: skip


def test_all_21_tasks_have_a_prompt_and_a_limit():
    assert len(MEMBERS) == 21 and set(MEMBERS) == set(PROMPTS) == set(NEW_TOKENS)
    assert {name for name, member in MEMBERS.items() if member.plain} == PLAIN


@pytest.mark.parametrize("name", sorted(MEMBERS))
def test_the_gold_answer_scores_1_and_the_empty_one_0(tmp_path, name):
    if name in CHINESE:
        pytest.importorskip("jieba")
    (sample,) = made(f"longbench/{name}", path=lines(tmp_path / f"{name}.jsonl", record(name)))
    task, right = f"longbench/{name}", sample.questions[0].answers[0]
    assert score(task, sample, right) == pytest.approx(1)
    assert score(task, sample, "") == 0
    filled = PROMPTS[name].replace("{context}", "A {context} of braces.").replace("{input}", "What is {it}?")
    assert prompt(sample) == filled
    assert sample.context.endswith("A {context} of braces.")
    assert sample.plain == (name in PLAIN)
    assert sample.questions[0].new_tokens == NEW_TOKENS[name]


def test_the_first_line_counts_where_it_was_published_so(tmp_path):
    (sample,) = made("longbench/trec", path=lines(tmp_path / "trec.jsonl", record("trec")))
    assert score("longbench/trec", sample, "\nOther location\nperson") == 1
    (sample,) = made("longbench/hotpotqa", path=lines(tmp_path / "hotpotqa.jsonl", record("hotpotqa")))
    # Two of four words are right: the second line counts.
    assert score("longbench/hotpotqa", sample, "Other location\nor person") == pytest.approx(2 * 2 / (2 + 4))
    assert first_line("\n\na\nb") == "a"


def test_a_long_record_keeps_both_halves_of_its_prompt(tmp_path):
    path = lines(tmp_path / "qmsum.jsonl", record("qmsum", context="".join(map(str, range(2000)))))
    (whole,), (cut,) = made("longbench/qmsum", path=path), made("longbench/qmsum", 1000, path=path)
    assert prompt(cut) == prompt(whole)[:500] + prompt(whole)[-500:]


def test_files_of_longbench_e_are_found_in_a_folder(tmp_path):
    lines(tmp_path / "qasper_e.jsonl", record("qasper"), record("qasper", length=7))
    found = made("longbench/qasper", path=str(tmp_path))
    assert [sample.questions[0].facts["length"] for sample in found] == [5, 7]


def test_a_broken_record_is_refused_by_its_line(tmp_path):
    rows = [record("trec"), record("trec", all_classes=None)]
    with pytest.raises(BadInput, match=r"trec\.jsonl:2: 'all_classes' is None"):
        made("longbench/trec", path=lines(tmp_path / "trec.jsonl", *rows))
    with pytest.raises(BadInput, match=r"lcc\.jsonl:1 has the fields"):
        made("longbench/lcc", path=lines(tmp_path / "lcc.jsonl", {"context": "x"}))
    with pytest.raises(BadInput, match="needs the option path"):
        made("longbench/lcc")


def test_the_lack_of_the_segmenter_is_found_before_anything_is_read(tmp_path, monkeypatch):
    def missing():
        raise BadInput("jieba")

    monkeypatch.setattr("kvx.eval.tasks.files.longbench.require_segmentation", missing)
    with pytest.raises(BadInput, match="jieba"):
        made("longbench/vcsum", path=str(tmp_path / "none"))
