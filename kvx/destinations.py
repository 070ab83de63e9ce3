"""Where results go: asked for before the work whose results it takes, and written whole or not at all."""

import os
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryFile

from kvx.errors import BadInput


def check_file(path: Path, name: str) -> None:
    """Refuse a file that cannot be written.

    Args:
        path: of a file, new or to be replaced.
        name: of the setting, for the refusal.

    Raises:
        BadInput: it is a folder, its folder does not exist, or nothing can be written there.
    """
    folder = path.absolute().parent
    if path.is_dir():
        raise BadInput(f"{name}={str(path)!r} is a folder; allowed: a file")
    if not folder.is_dir():
        raise BadInput(f"{name}={str(path)!r} lies in no folder; allowed: a file in a folder that exists")
    _try(folder, path, name)


def make_folder(path: Path, name: str) -> None:
    """Make a folder, and those above it, if they are not there.

    Raises:
        BadInput: a file is in the way, or nothing can be written there.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{name}={str(path)!r} cannot be made: {error.strerror or error}; allowed: a folder") from None
    _try(path, path, name)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file under its name complete or not at all.

    Raises:
        OSError: it cannot be written; what was there before still is.
    """
    with NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", delete=False) as file:
        try:
            file.write(content)
            file.close()
            os.chmod(file.name, 0o666 & ~umask())
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def umask() -> int:
    """What a new file's mode lacks, which temporary files do not heed."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _try(folder: Path, path: Path, name: str) -> None:
    try:
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise BadInput(f"{name}={str(path)!r} cannot be written: {error.strerror or error}") from None
