"""RULER's own generated files (Hsieh et al. 2024), "ruler_jsonl/..." each; "ruler/..." generates them here.

A file holds one object a line: {input, outputs, answer_prefix, ...}; in a folder it is TASK/validation.jsonl, as
RULER's scripts write it, or TASK.jsonl. A prompt was made for a length by some model's tokenizer, room for the answer
included; one that does not fit the length asked for by this model's is refused, since cutting it would change the task.
"""

from dataclasses import dataclass

from kvx.eval.metrics.string_match import match_all, match_part
from kvx.eval.tasks.files.fitting import whole
from kvx.eval.tasks.files.reading import Row, chosen, file_of, rows
from kvx.eval.tasks.registry import Score, task
from kvx.eval.tasks.sample import Question, Sample
from kvx.eval.tasks.source import Source, one


@dataclass(frozen=True)
class Family:
    """Tasks that are alike.

    Attributes:
        names: of the tasks.
        about: one line.
        new_tokens: of an answer.
        score: of an answer.
    """

    names: tuple[str, ...]
    about: str
    new_tokens: int
    score: Score = match_all


_SINGLE = ("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3")

FAMILIES = (
    Family(_SINGLE, "One needle in a haystack, of a file that RULER generated.", 128),
    Family(("niah_multivalue", "niah_multiquery"), "Four needles in a haystack, of a file that RULER generated.", 128),
    Family(("vt",), "Variable tracking, of a file that RULER generated.", 30),
    Family(("cwe",), "The ten most common words, of a file that RULER generated.", 120),
    Family(("fwe",), "The three most frequent coded words, of a file that RULER generated.", 50),
    Family(("qa_1", "qa_2"), "Questions over many documents, of a file that RULER generated.", 32, match_part),
)


def sample(row: Row, new_tokens: int) -> Sample:
    """A record as a prompt; the question is its last line."""
    text = row.text("input")
    cut = text.rfind("\n", 0, len(text.rstrip()))
    if cut <= 0:
        raise row.refusal("input", "a text whose last line is the question")
    asked = Question(text[cut:], row.texts("outputs"), row.text("answer_prefix", ""), new_tokens=new_tokens)
    return one(text[:cut], asked)


def _register(name: str, family: Family) -> None:
    def make(source: Source, length: int, count: int, seed: int, *, path: str, shuffle: bool = False) -> list[Sample]:
        found = rows(file_of(path, (f"{name}/validation.jsonl", f"{name}.jsonl")))
        return [
            whole(source, sample(row, family.new_tokens), length, row.where)
            for row in chosen(found, count, seed, shuffle)
        ]

    make.__doc__ = family.about
    binary = family.score is match_part or name in _SINGLE
    task(f"ruler_jsonl/{name}", score=family.score, group="ruler from files", binary=binary)(make)


for _family in FAMILIES:
    for _name in _family.names:
        _register(_name, _family)
