"""HumanEval (Chen et al. 2021): functions in Python, by the likelihood of the reference solution; no code is run."""

from kvx.eval.metrics.exact_match import verbatim
from kvx.eval.tasks.files.fitting import whole
from kvx.eval.tasks.files.reading import Row, chosen, file_of, rows
from kvx.eval.tasks.registry import task
from kvx.eval.tasks.sample import Question, Sample
from kvx.eval.tasks.source import Source, one


@task("humaneval", score=verbatim, group="code")
def humaneval(source: Source, length: int, count: int, seed: int, *, path: str, shuffle: bool = False) -> list[Sample]:
    """The body of a Python function: probability a token of the reference solution; no code is run.

    Not pass@1: what a policy does to it is measured without writing code. Never in a chat template. The last line of a
    prompt stands for the question, so that what was compressed is the text before it.

    Args:
        path: the file, of objects {task_id, prompt, canonical_solution}; or a folder with HumanEval.jsonl(.gz).
        shuffle: draw problems by the seed; else the first in the file's order.
    """
    found = rows(file_of(path, ("HumanEval.jsonl", "HumanEval.jsonl.gz")))
    return [whole(source, _sample(row), length, row.where) for row in chosen(found, count, seed, shuffle)]


def _sample(row: Row) -> Sample:
    prompt, solution = row.text("prompt"), row.text("canonical_solution")
    cut = prompt.rstrip().rfind("\n") + 1
    if not prompt[:cut].strip():
        raise row.refusal("prompt", "a text of two lines or more")
    if not solution.strip():
        raise row.refusal("canonical_solution", "a text that is not empty")
    facts = {"task_id": row.text("task_id")}
    return one(prompt[:cut], Question(prompt[cut:], (solution,), kind="likelihood", facts=facts), plain=True)
