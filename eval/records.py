"""The records of an evaluation: one line of JSON a sample, appended as soon as it is known, and read back in any state.

A line that was cut off (the process was killed while it wrote) is not a record; what it would have said is done again.
"""

import base64
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import numpy as np
from beartype.door import is_bearable
from jaxtyping import Bool

from kvx.errors import BadInput
from kvx.eval.tasks.sample import Mode

RECORDS, KEPT, COSTS = "records.jsonl", "kept.jsonl", "costs.jsonl"


@dataclass(frozen=True)
class Cell:
    """What is compared: policies in one cell see the same prompts.

    Attributes:
        model: as the job names it.
        task: its name, with its options where it was given some: "key_value(digits=32)".
        length: tokens of a prompt at most.
        mode: "agnostic": the context is compressed before any question is seen; "aware": with its (first) question at
            its end; "turns": as aware, later questions follow the right answers of those before, as in a conversation.
    """

    model: str
    task: str
    length: int
    mode: Mode


@dataclass(frozen=True)
class Record:
    """One sample under one policy.

    Attributes:
        cell: where it belongs.
        policy: its text.
        index: of the sample in its cell.
        sha256: of the prompt's token ids, questions included: records are paired only if these agree.
        tokens: of the prompt.
        depth: where the evidence lies in the prompt's text, from 0 to 1.
        answers: what was answered, question by question.
        expected: what would have been right, question by question.
        scores: question by question.
        measures: further numbers of this sample (fidelity: agreement, perplexity, ...).
        cache_bytes: this row's share of the resident cache once it is compressed, room for the answer included.
        bf16_bytes: of a full cache in bfloat16 under the same conditions.
        bytes_read: of the cache, that a decode step touches; a row's share.
        policy_bytes: of the policy's learned arrays.
        retention: share of the evidence's tokens that the cache still holds, mean over layers and KV heads; None where
            the sample has no evidence or the store no positions.
        seconds: "prefill" (shared by the policies of one pass) and "decode" of the batch that the sample ran in.
        compiled: whether those seconds hold compilation.
    """

    cell: Cell
    policy: str
    index: int
    sha256: str
    tokens: int
    depth: float | None
    answers: tuple[str, ...]
    expected: tuple[tuple[str, ...], ...]
    scores: tuple[float, ...]
    cache_bytes: int
    bf16_bytes: int
    bytes_read: int
    policy_bytes: int = 0
    retention: float | None = None
    measures: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    compiled: bool = False

    @property
    def score(self) -> float:
        """Mean over the questions."""
        return float(np.mean(self.scores))

    @property
    def share(self) -> float:
        """Resident bytes as a share of a bfloat16 full cache: the frontier's axis."""
        return self.cache_bytes / self.bf16_bytes


@dataclass(frozen=True)
class Kept:
    """What one policy kept of a cell's first prompt.

    Attributes:
        cell, policy: whose.
        text: the prompt's tokens, each as text.
        counts: tokens kept, by layer and KV head.
        bits: which, as `packed` makes it.
        shape: layers, KV heads, tokens.
    """

    cell: Cell
    policy: str
    text: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]
    bits: str
    shape: tuple[int, int, int]

    @staticmethod
    def packed(kept: Bool[np.ndarray, "L G T"]) -> str:
        """A mask as base64 of its bits."""
        return base64.b64encode(np.packbits(kept).tobytes()).decode()

    @property
    def mask(self) -> Bool[np.ndarray, "L G T"]:
        """Which tokens were kept."""
        flat = np.unpackbits(np.frombuffer(base64.b64decode(self.bits), np.uint8), count=int(np.prod(self.shape)))
        return flat.astype(bool).reshape(self.shape)


@dataclass(frozen=True)
class Cost:
    """What one policy costs at one prompt length and batch size.

    Attributes:
        model, policy: whose.
        length: tokens of each prompt.
        batch: prompts.
        cache_bytes: resident, all rows.
        metadata_bytes: of them, what is neither keys nor values nor codes of them: positions, statistics, tables.
        peak_bytes: device memory while the prompt is read and packed: arguments, temporaries and results.
        bytes_read: of the cache, in one decode step.
        prefill_seconds, step_seconds: medians, compilation excluded.
    """

    model: str
    policy: str
    length: int
    batch: int
    cache_bytes: int
    metadata_bytes: int
    peak_bytes: int
    bytes_read: int
    prefill_seconds: float
    step_seconds: float


Line = TypeVar("Line", Record, Kept, Cost)


def append(path: Path, lines: Iterable[Record | Kept | Cost]) -> None:
    """Add records to a file, whole or not at all as far as a reader can tell; they are on the disk when it returns."""
    text = "".join(json.dumps(asdict(each), ensure_ascii=False, allow_nan=False) + "\n" for each in lines)
    with path.open("ab") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def mend(path: Path) -> None:
    """Cut off a line that was not finished, so that the next one begins on a line of its own."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)


def read(path: Path, kind: type[Line]) -> list[Line]:
    """The records of a file; none if there is no file. A last line without its end does not count.

    Raises:
        BadInput: a line that is not such a record, with its number.
    """
    return list(_lines(path, kind)) if path.exists() else []


def _lines(path: Path, kind: type[Line]) -> Iterator[Line]:
    content = path.read_bytes()
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].split(b"\n")[:-1], 1):
        try:
            table = json.loads(line)
            if "cell" in table:
                table["cell"] = Cell(**table["cell"])
            yield _checked(kind(**{key: _frozen(value) for key, value in table.items()}))
        except (ValueError, TypeError, AttributeError) as error:
            raise BadInput(f"{str(path)!r}, line {number}, is no {kind.__name__.lower()}: {error}") from None


def _checked(line: Line) -> Line:
    """The same, if every field is of its type; a file may come from anywhere."""
    for name, hint in get_type_hints(type(line)).items():
        if not is_bearable(value := getattr(line, name), hint):
            raise TypeError(f"{name}={value!r:.80} is not of type {hint}")
    return line


def _frozen(value: Any) -> Any:
    return tuple(_frozen(each) for each in value) if isinstance(value, list) else value


def cells(records: Sequence[Record]) -> list[Cell]:
    """The cells of some records, each once, in their order."""
    return list(dict.fromkeys(record.cell for record in records))
