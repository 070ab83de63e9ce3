"""A bench without a model: sizes and scores by formulas of a policy's text, with every call written down."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

import kvx
from kvx.errors import BadInput
from kvx.eval.records import Cell, Record

FULL_BYTES = 1000.0
CELL = Cell("synthetic", "planted", 100, "agnostic")


def value(text: str, name: str, default: float) -> float:
    """A parameter's number in a policy's text."""
    found = text.partition(f"{name}=")[2]
    return float(found.split(",")[0].split(")")[0]) if found else default


def size(text: str) -> float:
    """Bytes a token: the share that a budget keeps, at the bits of the codes."""
    kept = value(text, "budget", 1.0)
    return FULL_BYTES * kept * (value(text, "bits", 2) / 16 if "kivi" in text else 1.0)


def worth(text: str) -> float:
    """Quality in [0, 1] as a function of the method: SnapKV is planted as the best, at a window of 16."""
    if text == "full":
        return 1.0
    kept = value(text, "budget", 1.0)
    loss = 0.25 * max(0.0, -np.log2(kept) - 1)
    loss += {2: 0.5, 3: 0.2, 4: 0.02, 8: 0.0}[int(value(text, "bits", 2))] if "kivi" in text else 0.0
    loss += 0.05 * abs(np.log2(value(text, "window", 64) / 16)) if "snapkv" in text else 0.3 * (text[:4] != "kivi")
    return max(0.0, 1.0 - loss)


class Synthetic:
    """A bench of `samples` samples, each with a difficulty that all policies share."""

    batch, floor = 4, 0.0

    def __init__(self, samples: int = 16, noise: float = 0.05):
        self.samples = samples
        self.noise = noise * np.random.default_rng(0).standard_normal(samples)
        self.sized: list[str] = []
        self.ran: list[tuple[str, int]] = []

    def sizes(self, texts: Sequence[str]) -> Mapping[str, float | BadInput]:
        """By the formula; chains that cannot be are refused by kvx itself."""
        self.sized += texts
        found: dict[str, float | BadInput] = {}
        for text in texts:
            try:
                kvx.parse_policy(text)
                found[text] = size(text)
            except BadInput as error:
                found[text] = error
        return found

    def run(self, texts: Sequence[str], samples: Sequence[int]) -> Iterator[list[Record]]:
        """One policy at a time."""
        for text in texts:
            self.ran += [(text, index) for index in samples]
            yield [self.record(text, index) for index in samples]

    def record(self, text: str, index: int) -> Record:
        """What running one sample would give."""
        score = worth(text) + float(self.noise[index])
        return Record(
            CELL, text, index, "0", 100, None, (), (), (score,), round(100 * size(text)), 100_000, round(size(text))
        )

    def quality(self, record: Record) -> float:
        """The score."""
        return record.score

    def nbytes(self, record: Record) -> float:
        """Of 100 tokens."""
        return record.cache_bytes / 100
