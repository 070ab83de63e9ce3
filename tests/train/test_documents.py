"""Files of texts and chats: of each the first chat is known wherever it stands, and columns hold one or the other."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from kvx.errors import BadInput
from kvx.train.data import open_documents

CHAT = [{"role": "user", "content": "a"}]


def lines(path, *records):
    path.write_text("".join(json.dumps({"text": record}) + "\n" for record in records))
    return str(path)


def table(path, rows, kind=None):
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(rows, kind)}), path)
    return str(path)


def test_the_first_chat_of_every_file_is_known_wherever_it_stands(tmp_path):
    other = [{"role": "user", "content": "b"}]
    paths = [lines(tmp_path / "a.jsonl", "text", "text", CHAT, other), lines(tmp_path / "b.jsonl", "text")]
    paths += [table(tmp_path / "c.parquet", [None, other]), table(tmp_path / "d.parquet", ["text", None])]
    assert open_documents(paths, "data.train").first_chats == [CHAT, other]


def test_tokens_are_known_where_all_files_are_of_tokens(tmp_path):
    for name, count in (("a", 7), ("b", 5)):
        np.save(tmp_path / f"{name}.npy", np.arange(count, dtype=np.uint16))
    paths = [str(tmp_path / "a.npy"), str(tmp_path / "b.npy")]
    assert open_documents(paths, "data.train", end=2).tokens == 12
    assert open_documents([*paths, lines(tmp_path / "c.jsonl", "text")], "data.train").tokens is None


@pytest.mark.parametrize(
    ("rows", "kind"),
    [
        ([[1, 2]], "list<(item|element): int64>"),
        ([["a", "b"]], "list<(item|element): string>"),
        ([[{"role": "user"}]], "list<(item|element): struct<role: string>>"),
        ([[{"role": 1, "content": "a"}]], "list<(item|element): struct<role: int64, content: string>>"),
        ([1], "int64"),
    ],
)
def test_a_column_of_other_lists_is_refused_by_its_file(tmp_path, rows, kind):
    path = table(tmp_path / "a.parquet", rows)
    with pytest.raises(BadInput, match=rf"a\.parquet: 'text' is of type {kind}; allowed: texts, or lists of messages"):
        open_documents([path], "data.train")
