"""Claims about where results go: what is there stays until what replaces it is whole."""

import os

import pytest

from kvx.destinations import replace_file


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    replace_file(tmp_path / "file", b"old")
    replace_file(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(TypeError):
        replace_file(tmp_path / "file", None)
    assert (tmp_path / "file").read_bytes() == b"new" and len(list(tmp_path.iterdir())) == 1


def test_a_new_file_has_the_rights_of_any_other(tmp_path):
    """Temporary files are private."""
    replace_file(tmp_path / "file", b"")
    (tmp_path / "other").write_bytes(b"")
    assert os.stat(tmp_path / "file").st_mode == os.stat(tmp_path / "other").st_mode
