"""The persistent compilation cache: compiled programs kept in a folder, so that a second run does not compile."""

import os
import re
from os import PathLike
from pathlib import Path

import jax
import platformdirs

from kvx.errors import BadInput


def enable_compilation_cache(path: str | PathLike[str] | None = None) -> Path:
    """Keep compiled programs in a folder from now on, and use those that are there.

    The library never does this by itself; the command line always does. A run of several processes calls it after
    `jax.distributed.initialize`.

    Where CPUs stand for several devices nothing is kept or used: XLA (jaxlib 0.10 to 0.12 at least) runs the
    collectives of a program in one order on every device, but not those of a program that it reads back, and devices
    then wait for each other until it aborts the process.

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
    if several_cpu_devices():
        jax.config.update("jax_enable_compilation_cache", False)  # a folder may have been named by JAX's variable too
        return folder
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # Programs that compile faster than this cost more to keep than to make again.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    return folder


def several_cpu_devices() -> bool:
    """Whether CPUs stand for several devices: simulated ones (XLA_FLAGS, `jax_num_cpu_devices`) or many processes'.

    JAX is asked for its devices only where processes have been joined: before, that would keep them from it.
    """
    if jax.distributed.is_initialized():
        return jax.default_backend() == "cpu" and jax.device_count() > 1
    flags = re.findall(r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    return any(int(count) > 1 for count in [jax.config.values["jax_num_cpu_devices"], *flags])
