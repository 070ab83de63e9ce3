"""What made some results: command, versions, commit, device."""

import os
import shlex
import subprocess
import sys
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


def _command() -> str:
    """As it was typed, without the folders of the program."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    module = spec and spec.name.removesuffix(".__main__")
    program = ["python", "-m", module] if module else [Path(sys.argv[0]).name or "python"]
    return shlex.join([*program, *sys.argv[1:]])


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
