"""GSM8K (Cobbe et al. 2021): school mathematics in words, with worked examples before the question."""

import re
from pathlib import Path

from kvx.errors import BadInput
from kvx.eval.metrics.numbers import extracted, final_number
from kvx.eval.tasks.files.fitting import fewer_examples
from kvx.eval.tasks.files.reading import Row, chosen, file_of, rows
from kvx.eval.tasks.options import within
from kvx.eval.tasks.registry import task
from kvx.eval.tasks.sample import Question, Sample
from kvx.eval.tasks.source import Source, one

NEW_TOKENS = 256


@task("gsm8k", score=final_number, group="reasoning", binary=True)
def gsm8k(
    source: Source, length: int, count: int, seed: int, *, path: str, shots: int = 8, shuffle: bool = False
) -> list[Sample]:
    """School mathematics in words, by worked examples; the final number must be right.

    The examples are the first of the training file, the same in the same order for every question, all in one turn of
    the user; the calculator's marks <<...>> are taken out of them, so that a solution is a chain of thought that ends
    with "#### NUMBER".

    Args:
        path: a folder with train.jsonl and test.jsonl, of objects {question, answer}.
        shots: worked examples, or fewer where the length holds fewer; at least one.
        shuffle: draw questions by the seed; else the first in the file's order.
    """
    within("gsm8k", "shots", shots, 1)
    if not Path(path).expanduser().is_dir():
        raise BadInput(f"path={path!r} is no folder; allowed: a folder with train.jsonl and test.jsonl")
    examples = [
        f"{_asked(row)} {_solution(row)}\n\n"
        for row in chosen(rows(file_of(path, ("train.jsonl", "train.jsonl.gz"))), shots, seed, False)
    ]
    found = []
    for row in chosen(rows(file_of(path, ("test.jsonl", "test.jsonl.gz"))), count, seed, shuffle):
        answer = str(extracted(_solution(row)))
        question = Question(_asked(row), (answer,), new_tokens=NEW_TOKENS, stop=("Question:",))

        def build(shots: int, question=question) -> Sample:
            return one("".join(examples[:shots]), question)

        found.append(fewer_examples(source, build, len(examples), length, "gsm8k"))
    return found


def _asked(row: Row) -> str:
    return f"Question: {row.text('question').strip()}\nAnswer:"


def _solution(row: Row) -> str:
    solution = re.sub(r"<<[^<>]*>>", "", row.text("answer")).strip()
    if extracted(solution.rpartition("####")[2]) is None or "####" not in solution:
        raise row.refusal("answer", 'a solution that ends with "#### NUMBER"')
    return solution
