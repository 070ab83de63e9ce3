"""Claims about the prose: halves that do not overlap, running text only, a checksum, the user's folder."""

import pytest

from kvx.errors import BadInput
from kvx.prose import documents, prose, sentences
from tests.eval.letters import Letters


def test_the_halves_are_of_equal_size_and_share_no_paragraph():
    source = prose()
    sizes = [sum(map(len, half)) for half in (source.haystack, source.held_out)]
    assert abs(sizes[0] - sizes[1]) < 0.05 * sum(sizes) and min(sizes) > 50_000
    assert source.haystack + source.held_out == source.paragraphs
    assert len(source.sha256) == 64 and source.sha256 == prose().sha256


def test_paragraphs_are_running_text():
    assert all(len(paragraph) >= 80 and paragraph[-1] in ".!?" for paragraph in prose().paragraphs)
    assert " ".join(sentences(prose().haystack)) == " ".join(prose().haystack)


def test_documents_have_the_exact_length_and_come_from_different_parts():
    rows = documents(Letters(), prose().held_out, 3, 200)
    assert rows.shape == (3, 200) and len({tuple(row) for row in rows.tolist()}) == 3
    with pytest.raises(BadInput, match="cut into 3 documents"):
        documents(Letters(), prose().held_out, 3, 10**6)


def test_a_folder_of_texts_in_the_order_of_names(tmp_path):
    line = "This is a sentence of plain running text that is long enough to count as a paragraph of prose.\n\n"
    (tmp_path / "b.md").write_text("Second part. " + line * 300)
    (tmp_path / "a.txt").write_text("First part. " + line * 300)
    (tmp_path / "c.py").write_text("never = read")
    source = prose(tmp_path)
    assert source.paragraphs[0].startswith("First") and source.name == str(tmp_path) and "never" not in source.text


def test_folders_that_do_not_do_are_refused(tmp_path):
    with pytest.raises(BadInput, match="is not a folder"):
        prose(tmp_path / "missing")
    with pytest.raises(BadInput, match=r"no \.txt or \.md"):
        prose(tmp_path)
    (tmp_path / "a.txt").write_text("Too short.")
    with pytest.raises(BadInput, match="running text; allowed: at least"):
        prose(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(BadInput, match="not UTF-8"):
        prose(tmp_path)
