"""Claims about LongMemEval: sessions by date, evidence in its place, the end cut, subsets, and the judge's file."""

import json

import pytest

from kvx.errors import BadInput
from kvx.eval.records import Cell, Record
from kvx.eval.tasks.files.longmemeval_export import export
from tests.eval.tasks.files.written import lines, made, prompt, score, source


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


def record(number=0, kind="single-session-user", **fields):
    return {
        "question_id": f"q{number}", "question_type": kind, "question": "What did I buy?",
        "answer": "a red bicycle", "question_date": "2023/05/30 (Tue) 10:00",
        "haystack_session_ids": ["b", "a"], "haystack_dates": ["2023/05/21 (Sun) 09:00", "2023/05/20 (Sat) 02:21"],
        "haystack_sessions": [
            [turn("user", "I bought a red bicycle.", has_answer=True), turn("assistant", "Ünice!")],
            [turn("user", "Hello."), turn("assistant", "Hi.", has_answer=False)],
        ],
        "answer_session_ids": ["b"], **fields,
    }  # fmt: skip


PROMPT = """I will give you several history chats between you and a user. Please answer the question based on the \
relevant chat history.


History Chats:


### Session 1:
Session Date: 2023/05/20 (Sat) 02:21
Session Content:

[{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hi."}]

### Session 2:
Session Date: 2023/05/21 (Sun) 09:00
Session Content:

[{"role": "user", "content": "I bought a red bicycle."}, {"role": "assistant", "content": "\\u00dcnice!"}]


Current Date: 2023/05/30 (Tue) 10:00
Question: What did I buy?
Answer:"""


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "longmemeval_s.json"
    kinds = ["single-session-user", "single-session-preference", "knowledge-update", "multi-session"]
    rows = [record(number, kind) for number, kind in enumerate(kinds)]
    file.write_text(json.dumps([*rows, record("4_abs", "multi-session")]))
    return str(tmp_path)


def test_sessions_stand_in_the_order_of_their_dates_without_marks(path):
    sample = made("longmemeval", path=path, reading="direct")[0]
    assert prompt(sample) == PROMPT
    assert sample.context.endswith("]\n") and sample.questions[0].text.startswith("\n\nCurrent Date")
    assert sample.questions[0].new_tokens == 500


def test_evidence_is_the_turn_with_the_answer(path):
    for reading in ("direct", "con"):
        sample = made("longmemeval", path=path, reading=reading)[0]
        ((first, last),) = sample.evidence
        assert sample.context[first:last] == '{"role": "user", "content": "I bought a red bicycle."}'
    history = sample.context.index("\n### Session 1")
    assert sample.depth == (first - history) / (len(sample.context) - history)


def test_the_newest_is_cut_and_evidence_with_it(path):
    whole = made("longmemeval", path=path)[0]
    size, (first, last) = source().size(whole), whole.evidence[0]
    after = len(whole.context) - last
    parts = {length: made("longmemeval", length, path=path)[0] for length in (size - after - 5, size - after - 80)}
    for length, cut in parts.items():
        assert source().size(cut) == length and whole.context.startswith(cut.context)
        assert cut.questions == whole.questions
    half, none = parts.values()
    assert half.evidence == ((first, last - 5),)
    assert none.evidence == () and none.depth is None


def test_words_of_the_answer_score_1(path):
    sample = made("longmemeval", path=path)[0]
    said = ("You bought a Red Bicycle!", "a red tricycle", "bicycle", "")
    assert [score("longmemeval", sample, each) for each in said] == [1, 0, 0, 0]


@pytest.mark.parametrize(
    ("subset", "expected"),
    [
        ("factual", ["q0", "q2", "q3"]),
        ("all", ["q0", "q1", "q2", "q3", "q4_abs"]),
        ("abstention", ["q4_abs"]),
        ("multi-session", ["q3", "q4_abs"]),
    ],
)
def test_subsets(path, subset, expected):
    found = made("longmemeval", path=path, subset=subset)
    assert [sample.questions[0].facts["question_id"] for sample in found] == expected


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"haystack_dates": ["2023"]}, "'haystack_sessions'"),
        ({"haystack_dates": [1, 2]}, "'haystack_dates'"),
        ({"haystack_sessions": [["x"], []]}, "'haystack_sessions'"),
        ({"haystack_sessions": [[{"role": "user"}], []]}, "'haystack_sessions'"),
        ({"question_type": "other"}, "'question_type'"),
        ({"answer": None}, "'answer'"),
    ],
)
def test_a_broken_record_is_refused_by_its_line(tmp_path, fields, says):
    with pytest.raises(BadInput, match=rf"m\.jsonl:2: {says}"):
        made("longmemeval", path=lines(tmp_path / "m.jsonl", record(), record(1, **fields)))


def test_unknown_names_are_refused(path):
    with pytest.raises(BadInput, match="did you mean 'all'"):
        made("longmemeval", path=path, subset="al")
    with pytest.raises(BadInput, match="known: con, direct"):
        made("longmemeval", path=path, reading="fast")


def answered(index, answer, policy="full"):
    cell = Cell("m", "longmemeval", 1000, "aware")
    return Record(cell, policy, index, "", 9, None, (answer,), ((),), (0.0,), 1, 1, 1)


def test_the_export_names_the_questions_that_were_asked(tmp_path, path):
    for shuffle in (False, True):
        asked = made("longmemeval", count=2, seed=3, path=path, subset="all", shuffle=shuffle)
        file = tmp_path / f"{shuffle}.jsonl"
        export([answered(1, " b"), answered(0, "ä\n")], file, path=path, seed=3, subset="all", shuffle=shuffle)
        names = [sample.questions[0].facts["question_id"] for sample in asked]
        expected = [{"question_id": name, "hypothesis": said} for name, said in zip(names, "äb", strict=True)]
        assert list(map(json.loads, file.read_text(encoding="utf-8").splitlines())) == expected


def test_an_export_of_what_does_not_belong_together_is_refused(tmp_path, path):
    file = tmp_path / "new"
    for records, says in (
        ([], "0 cells"),
        ([answered(0, "a"), answered(0, "a", "knorm")], "2 cells"),
        ([answered(9, "a")], "more questions than the 3"),
    ):
        with pytest.raises(BadInput, match=says):
            export(records, file, path=path, seed=0)
    assert not file.exists()
    file.write_text("mine")
    with pytest.raises(BadInput, match="exists"):
        export([answered(0, "a")], file, path=path, seed=0)
    assert file.read_text() == "mine"
