"""The manifest of a checkpoint: path, size and SHA-256 of every file, written when all of them are complete.

What stores the arrays does not notice damage: a flipped bit restores wrong numbers, or none, without a word. So a
folder counts as a checkpoint only with its manifest, and every file is compared with it before anything is restored.
"""

import hashlib
import json
import os
from pathlib import Path

NAME = "manifest.json"


class Damage(Exception):
    """A folder that is not what its manifest says: the first file that differs, and how."""

    def __init__(self, folder: Path, file: str, what: str):
        super().__init__(f"{folder}: file {file!r} {what}")
        self.folder, self.file = folder, file


def write(folder: Path) -> None:
    """Record every file of a folder; the record appears whole or not at all."""
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": _digest(folder / name)} for name in _files(folder)
    }
    text = json.dumps(files, indent=1, sort_keys=True)
    # The record vouches for itself too, or a flipped bit in it would blame a file that is whole.
    text += "\n" + hashlib.sha256(text.encode()).hexdigest() + "\n"
    partial = folder / f"{NAME}.partial"
    with open(partial, "w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    partial.rename(folder / NAME)


def exists(folder: Path) -> bool:
    """Whether a folder was completed."""
    return (folder / NAME).is_file()


def check(folder: Path, only: str | None = None) -> None:
    """Compare every file with the record.

    Args:
        only: the one file whose content is compared; None: that of all.

    Raises:
        Damage: a file that is missing, that the record does not know, or that holds other bytes; or a broken record.
    """
    recorded = _read(folder)
    present = set(_files(folder))
    for name, facts in recorded.items():
        if name not in present:
            raise Damage(folder, name, "is missing")
        size = (folder / name).stat().st_size
        if size != facts["bytes"]:
            raise Damage(folder, name, f"has {size} bytes instead of {facts['bytes']}")
    for name in sorted(present - recorded.keys()):
        raise Damage(folder, name, "does not belong there")
    for name, facts in recorded.items():
        if only in (None, name) and _digest(folder / name) != facts["sha256"]:
            raise Damage(folder, name, "is damaged: its SHA-256 is not the recorded one")


def _read(folder: Path) -> dict[str, dict]:
    content = (folder / NAME).read_bytes() if exists(folder) else b""
    text, _, digest = content.rstrip(b"\n").rpartition(b"\n")
    if not content or hashlib.sha256(text).hexdigest().encode() != digest:
        raise Damage(folder, NAME, "is damaged" if content else "is missing")
    return json.loads(text)


def _files(folder: Path) -> list[str]:
    found = (path for path in folder.rglob("*") if path.is_file())
    names = sorted(path.relative_to(folder).as_posix() for path in found)
    return [name for name in names if name not in (NAME, f"{NAME}.partial")]


def _digest(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
