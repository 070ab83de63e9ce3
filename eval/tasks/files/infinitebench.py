"""InfiniteBench (Zhang et al. 2024): twelve tasks beyond 100,000 tokens, "infinitebench/..." each.

A file holds one object a line: {context, input, answer, options}; in a folder it is TASK.jsonl. Prompts are those that
were published for open models (YaRN-Mistral's), output limits and scores those of all models, but for what the metrics
say.
"""

import re
from dataclasses import dataclass
from typing import Any

from kvx.eval.metrics.choice import LETTERS, choice, faulty_function
from kvx.eval.metrics.f1 import character_f1, token_f1
from kvx.eval.metrics.integers import first_integer, leading_integers
from kvx.eval.metrics.numbers import extracted, first_number, last_word_number
from kvx.eval.metrics.rouge import rouge_lsum
from kvx.eval.metrics.substring import name as name_score
from kvx.eval.metrics.substring import word
from kvx.eval.tasks.files.fitting import without_middle
from kvx.eval.tasks.files.infinitebench_prompts import NEW_TOKENS, PROMPTS
from kvx.eval.tasks.files.reading import Row, chosen, file_of, rows
from kvx.eval.tasks.files.template import filled
from kvx.eval.tasks.registry import Score, task
from kvx.eval.tasks.sample import Question, Sample
from kvx.eval.tasks.source import Source, one


@dataclass(frozen=True)
class Member:
    """One of the tasks.

    Attributes:
        about: one line.
        score: of an answer.
        binary: whether it is 0 or 1.
    """

    about: str
    score: Score
    binary: bool = True


MEMBERS = {
    "passkey": Member("A number hidden in repeated sentences.", first_integer),
    "number_string": Member("A number of repeated digits hidden in repeated sentences.", first_integer),
    "kv_retrieval": Member("The value of one key in a large JSON object.", word),
    "longbook_sum_eng": Member("Summaries of novels; ROUGE-Lsum.", rouge_lsum, False),
    "longbook_choice_eng": Member("Four options on a novel.", choice),
    "longbook_qa_eng": Member("Questions on novels; F1.", token_f1, False),
    "longbook_qa_chn": Member("Questions on Chinese novels; F1 of characters.", character_f1, False),
    "longdialogue_qa_eng": Member("Whose name is masked in a script.", name_score),
    "math_find": Member("The largest, smallest or median of a long list of numbers.", first_number),
    "math_calc": Member("All intermediate values of a long sum; share from the beginning.", leading_integers, False),
    "code_run": Member("What a call returns, through functions that call functions.", last_word_number),
    "code_debug": Member("Which of four functions was broken.", faulty_function),
}


def _register(name: str, member: Member) -> None:
    def make(source: Source, length: int, count: int, seed: int, *, path: str, shuffle: bool = False) -> list[Sample]:
        found = chosen(rows(file_of(path, (f"{name}.jsonl",))), count, seed, shuffle)
        return [without_middle(source, sample(name, row), length, f"infinitebench/{name}") for row in found]

    make.__doc__ = member.about
    task(f"infinitebench/{name}", score=member.score, group="infinitebench", binary=member.binary)(make)


def sample(name: str, row: Row) -> Sample:
    """A record as a prompt of any length.

    Raises:
        BadInput: a field that is missing or not as the task has it.
    """
    context, text = filled(PROMPTS[name], row.text("context"), _values(name, row))
    return one(context, Question(text, _answers(name, row), new_tokens=NEW_TOKENS[name]))


def _values(name: str, row: Row) -> dict[str, str]:
    asked = row.text("input", "")
    values = {"input": asked}
    if name in ("longbook_choice_eng", "code_debug"):
        values |= dict(zip(LETTERS, _options(row), strict=True))
    if name == "code_run":
        if not (call := re.search(r"(func_\d+)\(-?\d+\)", asked)):
            raise row.refusal("input", "a text with a call such as func_1(2)")
        values |= {"call": call[0], "function": call[1]}
    if name == "math_find":
        if not (what := re.search(r"(The .+) of", asked)):
            raise row.refusal("input", "a text such as 'The largest number of ...'")
        values["what"] = what[1].lower()
    return values


def _options(row: Row) -> tuple[str, ...]:
    options = row.texts("options")
    if len(options) != len(LETTERS):
        raise row.refusal("options", "four texts")
    return options


def _answers(name: str, row: Row) -> tuple[str, ...]:
    if name == "math_calc":
        listed: Any = row.table.get("answer")
        nested = isinstance(listed, list) and len(listed) == 1 and isinstance(listed[0], list)
        inner = Row(row.where, {"answer": listed[0]}) if nested else row
        return ("[" + ", ".join(inner.texts("answer")) + "]",)
    answers = row.texts("answer")
    if name in ("longbook_choice_eng", "code_debug"):
        if answers[0] not in (options := _options(row)):
            raise row.refusal("answer", "one of the options")
        return answers[0], LETTERS[options.index(answers[0])]
    if name in ("math_find", "code_run") and any(extracted(each) is None for each in answers):
        raise row.refusal("answer", "a number")
    return answers


for _name, _member in MEMBERS.items():
    _register(_name, _member)
