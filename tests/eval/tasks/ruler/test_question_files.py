"""Claims about the files of questions: what is read of them, and that broken ones are refused by their place."""

import json

import pytest

from kvx.errors import BadInput
from kvx.eval.tasks.ruler.question_files import read_hotpot, read_squad
from tests.eval.tasks.ruler.question_fixtures import ARTICLES, PARAGRAPHS, hotpot, paragraph, squad

READERS = pytest.mark.parametrize(("read", "write"), [(read_squad, squad), (read_hotpot, hotpot)])


def test_squad_gives_the_answerable_questions_with_their_paragraph_and_those_of_its_article(tmp_path):
    found = read_squad(squad(tmp_path))
    assert len(found.documents) == len(found.questions) == ARTICLES * PARAGRAPHS
    asked = found.questions[7]
    assert asked.text == "Who is mayor number 2 of town 1?" and asked.answers == ("Mayor1x2", "mayor number 2")
    assert [found.documents[number] for number in asked.gold] == [paragraph(1, 2)]
    assert [found.documents[number] for number in asked.near] == [paragraph(1, number) for number in (0, 1, 3, 4)]


def test_hotpot_gives_the_paragraphs_of_the_facts_and_the_others_of_the_question(tmp_path):
    found = read_hotpot(hotpot(tmp_path))
    assert len(found.questions) == ARTICLES and len(found.documents) == ARTICLES * 5
    asked = found.questions[2]
    assert asked.answers == ("cousin of Mayor2x0",)
    titles = [[found.documents[number].split("\n")[0] for number in numbers] for numbers in (asked.gold, asked.near)]
    assert titles == [["Last 2", "First 2"], ["More 2 a", "More 2 b", "More 2 c"]]
    assert found.documents[asked.gold[0]].startswith("Last 2\nTown 2 has 6 wells. Its mayor")


def test_a_paragraph_that_two_questions_share_is_one_document(tmp_path):
    def same(rows):
        rows[1]["context"][1] = rows[0]["context"][1]

    found = read_hotpot(hotpot(tmp_path, same))
    assert len(found.documents) == ARTICLES * 5 - 1
    assert set(found.questions[0].near) & set(found.questions[1].near)


@READERS
def test_a_cut_file_is_refused_by_line_and_column(tmp_path, read, write):
    path = write(tmp_path)
    lines = path.read_text().split("\n")
    path.write_text("\n".join(lines[:9]) + "\n  oops")
    with pytest.raises(BadInput, match=rf"{path}:10:3 is not JSON"):
        read(path)


@READERS
@pytest.mark.parametrize(
    ("content", "said"),
    [(b"\xff\xfe{", "is not UTF-8 at byte 0"), (b"3", "is a int; allowed: a"), (b"", ":1:1 is not JSON"),
     (b"[" * 200_000, "is not JSON that can be read"), (b"1" * 6000, "is not JSON that can be read")],
)  # fmt: skip
def test_what_is_no_such_file_is_refused(tmp_path, read, write, content, said):
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(BadInput, match=said) as refused:
        read(path)
    assert str(path) in str(refused.value)


@READERS
def test_a_file_that_is_not_there_is_refused(tmp_path, read, write):
    with pytest.raises(BadInput, match=r"none\.json cannot be read: No such file"):
        read(tmp_path / "none.json")
    with pytest.raises(BadInput, match="cannot be read: Is a directory"):
        read(tmp_path)


def squad_change(change):
    return squad, read_squad, lambda table: change(table["data"][1]["paragraphs"][2])


@pytest.mark.parametrize(
    ("write", "read", "change", "said"),
    [
        (*squad_change(lambda row: row.pop("context")), r"data\[1\]\.paragraphs\[2\] has the fields \['qas'\]"),
        (*squad_change(lambda row: row.update(context=3)), r"paragraphs\[2\]\.context is a int; allowed: a str"),
        (*squad_change(lambda row: row.update(qas={})), r"paragraphs\[2\]\.qas is a dict; allowed: a list"),
        (*squad_change(lambda row: row["qas"][1].pop("is_impossible")), r"qas\[1\] has the fields .*'is_impossible'"),
        (*squad_change(lambda row: row["qas"][1].update(answers=[])), r"qas\[1\] has no answer"),
        (*squad_change(lambda row: row["qas"][1].update(answers=["x"])), r"answers\[0\] is a str; allowed: a dict"),
        (squad, read_squad, lambda table: table.pop("data"), r"has the fields \['version'\]"),
        (squad, read_squad, lambda table: table["data"].clear(), "has 0 questions about 0 paragraphs"),
        (hotpot, read_hotpot, lambda rows: rows[3].pop("answer"), r"\[3\] has the fields"),
        (hotpot, read_hotpot, lambda rows: rows[3].update(answer=" "), r"\[3\] has no answer"),
        (hotpot, read_hotpot, lambda rows: rows[3].update(supporting_facts=[]), r"\[3\] has no .* paragraph"),
        (hotpot, read_hotpot, lambda rows: rows[3]["context"].pop(0), r"supporting_facts\[1\] names 'First 3'"),
        (hotpot, read_hotpot, lambda rows: rows[3]["context"][1].pop(), r"context\[1\] is no pair of a title"),
        (hotpot, read_hotpot, lambda rows: rows[3]["context"][1][1].append(3), r"context\[1\]\[1\]\[\d\] is a int"),
        (hotpot, read_hotpot, lambda rows: rows.clear(), "has 0 questions"),
    ],
)  # fmt: skip
def test_what_has_another_form_is_refused_by_its_place(tmp_path, write, read, change, said):
    path = write(tmp_path, change)
    with pytest.raises(BadInput, match=said) as refused:
        read(path)
    assert str(refused.value).startswith(str(path))


def test_a_file_with_nothing_beside_the_answers_is_refused(tmp_path):
    path = tmp_path / "one.json"
    qas = [{"question": "Who?", "answers": [{"text": "I"}], "is_impossible": False}]
    path.write_text(json.dumps({"data": [{"paragraphs": [{"context": "I am.", "qas": qas}]}]}))
    with pytest.raises(BadInput, match="has 1 questions about 1 paragraphs"):
        read_squad(path)
