"""MMLU (Hendrycks et al. 2021): questions of 57 subjects with four options, by the likelihood of the letters."""

from collections.abc import Iterator
from functools import cache
from itertools import chain, islice, zip_longest
from pathlib import Path

from kvx.errors import BadInput, unknown
from kvx.eval.metrics.choice import LETTERS
from kvx.eval.metrics.exact_match import verbatim
from kvx.eval.tasks.files.fitting import fewer_examples
from kvx.eval.tasks.files.reading import chosen, columns, file_of
from kvx.eval.tasks.options import within
from kvx.eval.tasks.registry import task
from kvx.eval.tasks.sample import Question, Sample
from kvx.eval.tasks.source import Source, one

_TEST, _DEV = "_test.csv", "_dev.csv"
_CHOICES = tuple(f" {letter}" for letter in LETTERS)


@task("mmlu", score=verbatim, group="knowledge", binary=True)
def mmlu(
    source: Source,
    length: int,
    count: int,
    seed: int,
    *,
    path: str,
    subset: str = "all",
    shots: int = 5,
    shuffle: bool = False,
) -> list[Sample]:
    """Four options in 57 subjects, by examples; the likeliest of " A" to " D" must be right.

    Never in a chat template: the letters are continuations of "Answer:".

    Args:
        path: a folder with test/SUBJECT_test.csv and dev/SUBJECT_dev.csv, of rows (question, A, B, C, D, letter).
        subset: a subject; "all": the first question of each, then the second of each, and so on.
        shots: examples of the subject's dev file, or fewer where the length holds fewer; at least one.
        shuffle: draw questions by the seed.
    """
    within("mmlu", "shots", shots, 1)
    folder = Path(path).expanduser()
    subjects = sorted(each.name.removesuffix(_TEST) for each in folder.glob(f"test/*{_TEST}"))
    if not subjects:
        raise BadInput(f"path={path!r} holds no test/SUBJECT{_TEST}; allowed: a folder with test and dev")
    if subset not in ("all", *subjects):
        raise unknown("subset of mmlu", subset, ["all", *subjects])

    @cache
    def examples(subject: str) -> list[str]:
        found = columns(file_of(path, (f"dev/{subject}{_DEV}",)), 6)
        return [f"{_text(row)} {_letter(where, row)}\n\n" for where, row in islice(found, shots)]

    files = [_questions(folder / "test" / f"{each}{_TEST}", each) for each in subjects if subset in ("all", each)]
    in_turn = (each for each in chain.from_iterable(zip_longest(*files)) if each is not None)
    found = []
    for subject, where, row in chosen(in_turn, count, seed, shuffle):
        letter = _letter(where, row)
        question = Question(_text(row), (f" {letter}",), kind="choose", choices=_CHOICES, facts={"subject": subject})

        def build(shots: int, subject=subject, question=question) -> Sample:
            heading = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}."
            return one(f"{heading}\n\n{''.join(examples(subject)[:shots])}", question, plain=True)

        found.append(fewer_examples(source, build, shots, length, "mmlu"))
    return found


def _questions(path: Path, subject: str) -> Iterator[tuple[str, str, list[str]]]:
    return ((subject, where, row) for where, row in columns(path, 6))


def _text(row: list[str]) -> str:
    options = "".join(f"\n{letter}. {text}" for letter, text in zip(LETTERS, row[1:5], strict=True))
    return f"{row[0]}{options}\nAnswer:"


def _letter(where: str, row: list[str]) -> str:
    if row[5] not in tuple(LETTERS):
        raise BadInput(f"{where} ends with {row[5][:40]!r}; allowed: A, B, C or D")
    return row[5]
