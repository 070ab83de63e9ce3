"""The persistent compilation cache: compiled programs kept in a folder, so that a second run does not compile."""

import os
from os import PathLike
from pathlib import Path

import jax
import platformdirs

from kvx.errors import BadInput


def enable_compilation_cache(path: str | PathLike[str] | None = None) -> Path:
    """Keep compiled programs in a folder from now on, and use those that are there.

    The library never does this by itself; the command line always does.

    Args:
        path: the folder. None: "compiled" in the user's cache folder of kvx (XDG_CACHE_HOME or KVX_CACHE move it).

    Returns:
        The folder.

    Raises:
        BadInput: a folder that cannot be made or written.
    """
    if path is None:
        base = os.environ.get("KVX_CACHE") or platformdirs.user_cache_dir("kvx", appauthor=False)
        folder = Path(base) / "compiled"
    else:
        folder = Path(path).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"path is {str(folder)!r}, which cannot be made: {error.strerror or error}") from None
    if not os.access(folder, os.W_OK):
        raise BadInput(f"path is {str(folder)!r}, which cannot be written; allowed: a writable folder")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # Programs that compile faster than this cost more to keep than to make again.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    return folder
