"""Claims about files: what is read, in which order, and that a broken one is refused by file and line."""

import gzip
import json

import pytest

from kvx.errors import BadInput
from kvx.eval.tasks.files import reading
from kvx.eval.tasks.files.reading import Row, chosen, columns, file_of, rows


def write(path, content):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz"])
def test_every_form_gives_the_same_records(tmp_path, name):
    records = [{"a": 1}, {"a": "ü"}]
    listed = name.startswith("a.json") and "jsonl" not in name
    text = json.dumps(records) if listed else "\n\n".join(map(json.dumps, records)) + "\n"
    content = gzip.compress(text.encode()) if name.endswith(".gz") else text.encode()
    assert [dict(row.table) for row in rows(write(tmp_path / name, content))] == records


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n', r"a\.jsonl:2 is not JSON"),
        ("a.jsonl", b'{"a": 1}\n\n[1]\n', r"a\.jsonl:3 is a list"),
        ("a.jsonl", b'{"a": "\xff"}\n', r"a\.jsonl:1 is not UTF-8"),
        ("a.jsonl", b"[" * 200_000, r"a\.jsonl:1 is not JSON"),
        ("a.jsonl", b'{"a": ' + b"9" * 10_000 + b"}", r"a\.jsonl:1 is not JSON"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n')[:-9], r"a\.jsonl\.gz:\d cannot be unpacked"),
        ("a.jsonl.gz", b'{"a": 1}\n', r"a\.jsonl\.gz:1 cannot be unpacked"),
        ("a.json", b'[{"a": 1},\n{"a" 2}]', r"a\.json is not JSON .* at line 2, column 6"),
        ("a.json", b'{"a": 1}', r"a\.json is a dict"),
        ("a.json", b'[{"a": 1}, 2]', r"a\.json, record 2 is a int"),
    ],
    ids=[
        "broken line",
        "not an object",
        "not UTF-8",
        "endless lists",
        "endless number",
        "cut off",
        "not packed",
        "broken list",
        "not a list",
        "not a list of objects",
    ],
)
def test_a_broken_file_is_refused_by_its_place(tmp_path, name, content, says):
    with pytest.raises(BadInput, match=says):
        list(rows(write(tmp_path / name, content)))


def test_a_missing_or_unreadable_file_is_refused(tmp_path):
    with pytest.raises(BadInput, match="cannot be read"):
        list(rows(tmp_path / "none.jsonl"))
    with pytest.raises(BadInput, match="cannot be read"):
        list(columns(tmp_path, 2))


def test_sizes_are_limited_after_unpacking(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "LONGEST", 50)
    monkeypatch.setattr(reading, "LARGEST", 100)
    line = json.dumps({"a": "x" * 30}).encode() + b"\n"
    assert len(list(rows(write(tmp_path / "a.jsonl.gz", gzip.compress(line * 2))))) == 2
    with pytest.raises(BadInput, match=r":3 is beyond 100 bytes"):
        list(rows(write(tmp_path / "a.jsonl.gz", gzip.compress(line * 3))))
    with pytest.raises(BadInput, match=r":1 is longer than 50 bytes"):
        list(rows(write(tmp_path / "b.jsonl.gz", gzip.compress(b"0" * 1_000_000))))
    with pytest.raises(BadInput, match="longer than 100 bytes"):
        list(rows(write(tmp_path / "a.json.gz", gzip.compress(b"0" * 1_000_000))))
    with pytest.raises(BadInput, match="at most 100"):
        list(columns(write(tmp_path / "a.csv", b"0" * 101), 1))


def test_lines_after_those_that_are_taken_are_not_read(tmp_path):
    found = rows(write(tmp_path / "a.jsonl", b'{"a": 1}\nbroken\n'))
    assert [row.table["a"] for row in chosen(found, 1, 0, False)] == [1]


def test_the_first_are_chosen_in_order_and_a_seed_draws_others():
    assert chosen(range(100), 5, 0, False) == [0, 1, 2, 3, 4]
    drawn = chosen(range(100), 5, 0, True)
    assert drawn == chosen(range(100), 5, 0, True) != chosen(range(100), 5, 1, True)
    assert len(set(drawn)) == 5 and drawn != sorted(drawn)
    for count in (1, 50, 100, 200):
        more = chosen(iter(range(100)), count, 0, True)
        assert more[:5] == drawn[:count] and len(set(more)) == min(count, 100)
    with pytest.raises(BadInput, match="no record"):
        chosen([], 5, 0, True)


def test_a_path_is_a_file_or_a_folder_with_it(tmp_path):
    file = write(tmp_path / "b.jsonl", b"")
    assert file_of(str(file), ("a.jsonl",)) == file
    assert file_of(str(tmp_path), ("a.jsonl", "b.jsonl")) == file
    with pytest.raises(BadInput, match=r"no file 'a\.jsonl'"):
        file_of(str(tmp_path), ("a.jsonl",))
    with pytest.raises(BadInput, match="no file 'c'"):
        file_of(str(tmp_path / "c"), ("a.jsonl",))


def test_fields_are_checked():
    row = Row("f:7", {"text": "x", "number": 3, "many": ["x", 2.5], "none": [], "flag": True, "half": "\ud800"})
    assert row.text("text") == "x" and row.text("else", "") == ""
    assert row.texts("text") == ("x",) and row.texts("number") == ("3",) and row.texts("many") == ("x", "2.5")
    for refused in (
        lambda: row.text("number"), lambda: row.text("half"), lambda: row.text("else"), lambda: row.texts("else"),
        lambda: row.texts("none"), lambda: row.texts("flag"), lambda: row.texts("half"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match="f:7"):
            refused()


def test_csv_rows_know_their_lines(tmp_path):
    file = write(tmp_path / "a.csv", b'x,"two\nlines"\ny,z\n')
    assert list(columns(file, 2)) == [(f"{file}:2", ["x", "two\nlines"]), (f"{file}:3", ["y", "z"])]
    with pytest.raises(BadInput, match=r"a\.csv:2 has 2 columns; allowed: 3"):
        list(columns(file, 3))
    with pytest.raises(BadInput, match="not UTF-8"):
        list(columns(write(file, b"\xff,\xff\n"), 2))
    with pytest.raises(BadInput, match="not CSV"):
        list(columns(write(file, b'"' + b"x" * 200_000 + b'",y\n'), 2))
