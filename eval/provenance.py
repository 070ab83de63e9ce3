"""What made some results: command, versions, commit, device; and writing a file whole or not at all."""

import os
import shlex
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any

import jax

import kvx

PACKAGES = ("kvx", "jax", "jaxlib", "flax", "numpy", "tokenizers")


def provenance() -> dict[str, Any]:
    """The command, the versions of what computed, the commit of kvx where it runs from a checkout, and the device."""
    return {
        "command": _command(),
        "versions": {"python": python_version(), **{name: version(name) for name in PACKAGES}},
        "commit": _commit(),
        "device": {
            "platform": jax.default_backend(),
            "kind": jax.devices()[0].device_kind,
            "count": jax.device_count(),
            "cores": os.cpu_count(),
        },
    }


def replace_file(path: Path, content: bytes) -> None:
    """Write a file under its name complete or not at all."""
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", delete=False) as file:
        try:
            file.write(content)
            file.close()
            os.chmod(file.name, 0o666 & ~_umask())
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def _command() -> str:
    """As it was typed, without the folders of the program."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    module = spec and spec.name.removesuffix(".__main__")
    program = ["python", "-m", module] if module else [Path(sys.argv[0]).name or "python"]
    return shlex.join([*program, *sys.argv[1:]])


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _commit() -> str | None:
    """The checkout's commit, marked where files differ from it; None for an installed package."""
    here = Path(kvx.__file__).parents[1]
    if not (here / ".git").exists():
        return None
    try:
        told = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=here, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return told.stdout.strip()
