"""Files of a suite's format, written by the tests, and a source of single characters to read them with."""

import json
from functools import cache
from pathlib import Path

from kvx.eval.prompts import Frame
from kvx.eval.tasks.registry import find
from kvx.eval.tasks.sample import Sample
from kvx.eval.tasks.source import Source
from kvx.prose import prose
from tests.eval.letters import Letters

_prose = cache(prose)


def source(frame: Frame | None = None) -> Source:
    return Source(Letters(), _prose(), frame or Frame())


def lines(path: Path, *rows) -> str:
    """JSON lines; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def made(name: str, length: int = 100_000, count: int = 10, seed: int = 0, **options) -> list[Sample]:
    """A task's samples, its options checked as a job checks them."""
    task = find(name)
    task.check(options)
    return list(task.make(source(), length, count, seed, **options))


def score(name: str, sample: Sample, answer: str) -> float:
    """What the task gives for an answer to a sample's question."""
    return find(name).score(answer, sample.questions[0])


def prompt(sample: Sample) -> str:
    """Context and question as one text."""
    return sample.context + sample.questions[0].text
