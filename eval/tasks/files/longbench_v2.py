"""LongBench v2 (Bai et al. 2025): questions with four options on documents of up to two million words."""

from kvx.eval.metrics.choice import LETTERS, correct_answer_is
from kvx.eval.tasks.files.fitting import without_middle
from kvx.eval.tasks.files.reading import Row, chosen, file_of, rows
from kvx.eval.tasks.files.template import filled
from kvx.eval.tasks.registry import task
from kvx.eval.tasks.sample import Question, Sample
from kvx.eval.tasks.source import Source, one

NEW_TOKENS = 128

# To the letter, as published: the answer is looked for in the form that it asks for.
_PROMPT = (
    "Please read the following text and answer the question below.\n\n<text>\n{context}\n</text>\n\n"
    "What is the correct answer to this question: {question}\nChoices:\n(A) {A}\n(B) {B}\n(C) {C}\n(D) {D}\n\n"
    'Format your response as follows: "The correct answer is (insert answer here)".'
)


@task("longbench_v2", score=correct_answer_is, group="longbench v2", binary=True)
def longbench_v2(
    source: Source, length: int, count: int, seed: int, *, path: str, shuffle: bool = False
) -> list[Sample]:
    """Four options on very long documents, the answer in a fixed form of words.

    The published run samples at temperature 0.1 with 120,000 tokens; this one is greedy. Facts of a question: its
    "difficulty" (easy, hard), "length" (short, medium, long: of the document in words) and "domain".

    Args:
        path: the file, a list of objects or one a line; or a folder with data.json.
        shuffle: draw records by the seed; else the first in the file's order.
    """
    found = rows(file_of(path, ("data.json", "data.jsonl")))
    return [without_middle(source, _sample(row), length, "longbench_v2") for row in chosen(found, count, seed, shuffle)]


def _sample(row: Row) -> Sample:
    letter = row.text("answer")
    if letter not in LETTERS or len(letter) != 1:
        raise row.refusal("answer", "A, B, C or D")
    values = {each: row.text(f"choice_{each}").strip() for each in LETTERS} | {"question": row.text("question").strip()}
    context, text = filled(_PROMPT, row.text("context").strip(), values)
    facts = {each: row.text(each, "") for each in ("_id", "domain", "difficulty", "length")}
    return one(context, Question(text, (letter,), new_tokens=NEW_TOKENS, facts=facts))
