"""Which files a job's paths stand for: files themselves, folders of them, and Hugging Face datasets on disk."""

import json
from collections.abc import Sequence
from pathlib import Path

from kvx.errors import BadInput

TEXT = (".txt", ".md", ".rst")
LINES = (".jsonl", ".jsonl.gz")
TABLES = (".parquet", ".arrow")
TOKENS = (".npy", ".bin")
KNOWN = (*TEXT, *LINES, *TABLES, *TOKENS)

PYTHON_DOCS = ("python-docs/first-half", "python-docs/second-half")
"""Stand for Python's own documentation, a few hundred kilobytes that are always there, so that a job runs as it is."""


def suffix(path: Path) -> str:
    """The one of `KNOWN` that the file's name ends with; "" for others."""
    return next((each for each in KNOWN if path.name.lower().endswith(each)), "")


def expand(paths: Sequence[str], name: str, known: Sequence[str] = KNOWN) -> tuple[Path, ...]:
    """The files of paths, in the order of the paths, a folder's by name.

    Args:
        paths: files, folders (searched to any depth), Hugging Face datasets as `save_to_disk` writes them, or one of
            `PYTHON_DOCS`, which comes back as it is.
        name: of the setting, for refusals.
        known: suffixes of files that count.

    Raises:
        BadInput: no path; one that does not exist, or is a file of another kind; a folder without such files.
    """
    if not paths:
        raise BadInput(f"{name} is empty; allowed: files or folders of {', '.join(known)}")
    return tuple(file for path in paths for file in _files(Path(path).expanduser(), name, known))


def _files(path: Path, name: str, known: Sequence[str]) -> list[Path]:
    if str(path) in PYTHON_DOCS:
        return [path]
    if path.is_file():
        if suffix(path) not in known:
            raise BadInput(f"{name} has {str(path)!r}; allowed: files of {', '.join(known)}, or folders of them")
        return [path]
    if not path.is_dir():
        raise BadInput(f"{name} has {str(path)!r}, which does not exist; allowed: files or folders that do")
    if (path / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(each.name for each in path.iterdir() if each.is_dir()))
        raise BadInput(f"{name} has {str(path)!r}, a dataset of several splits; allowed: one of its folders {splits}")
    if (path / "state.json").is_file():
        return _of_dataset(path, name)
    found = sorted(file for file in path.rglob("*") if file.is_file() and suffix(file) in known)
    if not found:
        raise BadInput(f"{name} has {str(path)!r}, a folder; allowed: one with files of {', '.join(known)}")
    return found


def _of_dataset(path: Path, name: str) -> list[Path]:
    """The Arrow files that hold a dataset's rows; caches of old transformations may lie beside them."""
    try:
        entries = json.loads((path / "state.json").read_text())["_data_files"]
        files = [path / entry["filename"] for entry in entries]
    except (OSError, ValueError, KeyError, TypeError):
        raise BadInput(f"{name} has {str(path)!r}, whose state.json names no _data_files; allowed: a dataset") from None
    if missing := [file for file in files if not file.is_file()]:
        raise BadInput(f"{name} has {str(path)!r}, a dataset that lacks {missing[0].name}; allowed: a whole one")
    return files
