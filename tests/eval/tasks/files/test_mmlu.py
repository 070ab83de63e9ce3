"""Claims about MMLU: the prompt, the letters, subjects in turn, and fewer examples where there is no room."""

import csv

import pytest

from kvx.errors import BadInput
from tests.eval.tasks.files.written import made, prompt, score


def write(folder, kind, subject, *rows):
    (folder / kind).mkdir(exist_ok=True)
    with (folder / kind / f"{subject}_{kind}.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)


@pytest.fixture
def path(tmp_path):
    for subject in ("high_school_physics", "anatomy"):
        write(tmp_path, "dev", subject, *([f"{subject} dev {n}?", *"wxyz", "ABCD"[n % 4]] for n in range(5)))
        write(tmp_path, "test", subject, *([f"{subject} {n}?", "1, 2", '"b"', "c", "d", "C"] for n in range(3)))
    return str(tmp_path)


def test_examples_come_before_the_question(path):
    (sample,) = made("mmlu", count=1, path=path, subset="high_school_physics", shots=2)
    assert prompt(sample) == (
        "The following are multiple choice questions (with answers) about high school physics.\n\n"
        "high_school_physics dev 0?\nA. w\nB. x\nC. y\nD. z\nAnswer: A\n\n"
        "high_school_physics dev 1?\nA. w\nB. x\nC. y\nD. z\nAnswer: B\n\n"
        'high_school_physics 0?\nA. 1, 2\nB. "b"\nC. c\nD. d\nAnswer:'
    )
    assert sample.questions[0].text.startswith("high_school_physics 0?") and sample.plain


def test_the_letter_is_chosen(path):
    (sample,) = made("mmlu", count=1, path=path)
    question = sample.questions[0]
    assert question.kind == "choose" and question.choices == (" A", " B", " C", " D")
    assert [score("mmlu", sample, each) for each in question.choices] == [0, 0, 1, 0]
    assert score("mmlu", sample, "") == 0


def test_subjects_take_turns(path):
    found = made("mmlu", count=4, path=path)
    asked = [sample.questions[0].text.split("?")[0] for sample in found]
    assert asked == ["anatomy 0", "high_school_physics 0", "anatomy 1", "high_school_physics 1"]
    assert all(sample.context.count(sample.questions[0].facts["subject"] + " dev") == 5 for sample in found)


def test_as_many_examples_as_fit(path):
    (sample,) = made("mmlu", 260, count=1, path=path)
    assert sample.context.count("Answer") == 3
    with pytest.raises(BadInput, match="too short for task=mmlu"):
        made("mmlu", 100, path=path)


def test_broken_files_are_refused(tmp_path, path):
    with pytest.raises(BadInput, match="did you mean 'anatomy'"):
        made("mmlu", path=path, subset="anatomi")
    write(tmp_path, "test", "anatomy", ["q", *"wxyz", "A"], ["q", *"wxyz", "E"])
    with pytest.raises(BadInput, match=r"anatomy_test\.csv:2 ends with 'E'"):
        made("mmlu", path=path)
    (tmp_path / "dev" / "anatomy_dev.csv").unlink()
    with pytest.raises(BadInput, match=r"no file 'anatomy_dev\.csv'"):
        made("mmlu", path=path)
    with pytest.raises(BadInput, match="holds no test/SUBJECT_test"):
        made("mmlu", path=str(tmp_path / "dev"))
