"""LongMemEval (Wu et al. 2025): questions after a long, dated history of chats, answers read without a judge.

The official score is a judge's (a large model that reads question, right answer and hypothesis): `longmemeval_export`
writes the file that it takes. The score here is not comparable with it: whether the right answer's words occur in the
answer. It says nothing of questions whose right answer is a rubric (preferences) or an explanation (those that cannot
be answered, "_abs"), which the default subset therefore leaves out. What needs no judge is retention: the evidence of a
sample is the turns marked has_answer, and a record says how much of them the cache still holds.
"""

import json
from collections.abc import Iterator
from typing import Any

from kvx.errors import unknown
from kvx.eval.metrics.substring import normalised_substring
from kvx.eval.tasks.files.fitting import beginning
from kvx.eval.tasks.files.reading import Row, chosen, file_of, rows
from kvx.eval.tasks.registry import task
from kvx.eval.tasks.sample import Question, Sample
from kvx.eval.tasks.source import Source, one

FILES = ("longmemeval_s_cleaned.json", "longmemeval_s.json", "longmemeval_oracle.json")
TYPES = (
    "single-session-user", "single-session-assistant", "single-session-preference", "temporal-reasoning",
    "knowledge-update", "multi-session",
)  # fmt: skip
SUBSETS = ("factual", "all", "abstention", *TYPES)

# To the letter, as published for the full history.
_OPENING = (
    "I will give you several history chats between you and a user. Please answer the question based on the relevant "
    "chat history.{how}\n\n\nHistory Chats:\n\n"
)
_CLOSING = "\n\nCurrent Date: {date}\nQuestion: {question}\n{answer}"
_READINGS = {
    "direct": ("", "Answer:", 500),
    "con": (
        " Answer the question step by step: first extract all the relevant information, and then reason over the "
        "information to get the answer.",
        "Answer (step by step):",
        800,
    ),
}
"""What is added to the instruction, the answer's opening in the question, and tokens of an answer."""


@task("longmemeval", score=normalised_substring, group="longmemeval (substring, not the official judge)", binary=True)
def longmemeval(
    source: Source,
    length: int,
    count: int,
    seed: int,
    *,
    path: str,
    subset: str = "factual",
    reading: str = "con",
    shuffle: bool = False,
) -> list[Sample]:
    """Questions after a long history of chats; normalised substring, which is not the official judge.

    A history that is too long loses its newest sessions, as published, which costs questions on updates most; evidence
    that is cut off counts as none.

    Args:
        path: the file, a list of objects or one a line; or a folder with one of `FILES`.
        subset: "factual": all but preferences and abstention; "all"; "abstention"; or one question type.
        reading: "con": extract facts, then reason; "direct": answer.
        shuffle: draw records by the seed; else the first in the file's order, which is sorted by type.
    """
    if reading not in _READINGS:
        raise unknown("reading of longmemeval", reading, _READINGS)
    how, opening, new_tokens = _READINGS[reading]
    found = []
    for row in selected(path, count, seed, subset, shuffle):
        before, (text, spans) = _OPENING.format(how=how), history(row)
        values = {"date": row.text("question_date"), "question": row.text("question"), "answer": opening}
        facts = {"question_id": row.text("question_id"), "question_type": row.text("question_type")}
        asked = Question(_CLOSING.format(**values), row.texts("answer"), new_tokens=new_tokens, facts=facts)

        def build(characters: int, before=before, text=text, spans=spans, asked=asked) -> Sample:
            seen = [(first, min(last, characters)) for first, last in spans if first < characters]
            evidence = tuple((len(before) + first, len(before) + last) for first, last in seen)
            depth = seen[0][0] / characters if seen else None
            return one(before + text[:characters], asked, evidence=evidence, depth=depth)

        found.append(beginning(source, text, build, length, "longmemeval"))
    return found


def selected(path: str, count: int, seed: int, subset: str, shuffle: bool) -> list[Row]:
    """The records that a run of the task asks, in its order.

    Raises:
        BadInput: an unknown subset, or no record of it.
    """
    if subset not in SUBSETS:
        raise unknown("subset of longmemeval", subset, SUBSETS)
    belonging = (row for row in rows(file_of(path, FILES)) if _belongs(row, subset))
    return chosen(belonging, count, seed, shuffle)


def history(row: Row) -> tuple[str, list[tuple[int, int]]]:
    """A record's sessions in the order of their dates, as one text, and where in it the turns with evidence stand.

    Each session has a heading, its date, and its turns as a JSON list; the marks of evidence are left out.

    Raises:
        BadInput: sessions and dates that do not belong together; turns without a role or a content.
    """
    text, spans = "", []
    for number, (date, turns) in enumerate(sorted(_sessions(row), key=lambda session: session[0]), 1):
        pieces, at = [f"\n### Session {number}:\nSession Date: {date}\nSession Content:\n\n["], 0
        start = len(text) + len(pieces[0])
        for turn in turns:
            said = json.dumps({key: value for key, value in turn.items() if key != "has_answer"})
            if turn.get("has_answer"):
                spans.append((start + at, start + at + len(said)))
            pieces.append(said + ", ")
            at += len(said) + 2
        text += "".join(pieces).removesuffix(", ") + "]\n"
    return text, spans


def _belongs(row: Row, subset: str) -> bool:
    kind, abstains = row.text("question_type"), row.text("question_id").endswith("_abs")
    if kind not in TYPES:
        raise row.refusal("question_type", ", ".join(TYPES))
    if subset == "factual":
        return not abstains and kind != "single-session-preference"
    return subset in ("all", kind) or (subset == "abstention" and abstains)


def _sessions(row: Row) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    dates, sessions = row.table.get("haystack_dates"), row.table.get("haystack_sessions")
    if not isinstance(dates, list) or not all(isinstance(each, str) for each in dates) or not dates:
        raise row.refusal("haystack_dates", "a list of texts")
    if not isinstance(sessions, list) or len(sessions) != len(dates):
        raise row.refusal("haystack_sessions", f"a list of {len(dates)} sessions, one a date")
    for date, turns in zip(dates, sessions, strict=True):
        if not isinstance(turns, list) or not all(map(_is_turn, turns)):
            raise row.refusal("haystack_sessions", "lists of turns, each with a role and a content")
        yield date, turns


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
