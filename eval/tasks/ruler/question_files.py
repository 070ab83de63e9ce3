"""The files of RULER's question answering: SQuAD v2 and HotpotQA (distractor), as published; hostile until parsed."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from kvx.errors import BadInput

LARGEST = 500_000_000
"""Bytes of a file at most; HotpotQA's has 46 million."""

T = TypeVar("T", str, bool, list, dict)


@dataclass(frozen=True)
class Asked:
    """A question about some documents.

    Attributes:
        text: the question.
        answers: what counts as right.
        gold: the documents that the answer rests on, by their number in the file.
        near: documents of the same article (SQuAD) or of the question's own search (HotpotQA).
    """

    text: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    near: tuple[int, ...]


@dataclass(frozen=True)
class QuestionFile:
    """Documents, each once, and questions about them, in the file's order."""

    documents: tuple[str, ...]
    questions: tuple[Asked, ...]


def read_squad(path: Path) -> QuestionFile:
    """SQuAD v2: the answerable questions, about paragraphs of articles.

    Raises:
        BadInput: a file that cannot be read, is not JSON (with line and column), or not of this form (with the place).
    """
    documents, questions = _Numbers(), []
    for article, where in _each(_field(_load(path, dict), "data", list, str(path)), dict, f"{path}: data"):
        paragraphs = list(_each(_field(article, "paragraphs", list, where), dict, f"{where}.paragraphs"))
        numbers = [documents.of(_field(each, "context", str, at)) for each, at in paragraphs]
        for (paragraph, at), number in zip(paragraphs, numbers, strict=True):
            near = tuple(dict.fromkeys(each for each in numbers if each != number))
            for row, place in _each(_field(paragraph, "qas", list, at), dict, f"{at}.qas"):
                if _field(row, "is_impossible", bool, place):
                    continue
                texts = _each(_field(row, "answers", list, place), dict, f"{place}.answers")
                answers = tuple(dict.fromkeys(_field(each, "text", str, spot) for each, spot in texts))
                questions.append(_asked(_field(row, "question", str, place), answers, (number,), near, place))
    return _checked(path, documents, questions)


def read_hotpot(path: Path) -> QuestionFile:
    """HotpotQA, distractor setting: ten paragraphs a question, of which the answer rests on two.

    Raises:
        BadInput: as `read_squad`; also facts that name no paragraph of their question.
    """
    documents, questions = _Numbers(), []
    for row, where in _each(_load(path, list), dict, f"{path}: "):
        titles: dict[str, int] = {}
        for (title, lines), at in _pairs(row, "context", where, list):
            body = "".join(text for text, _ in _each(lines, str, f"{at}[1]"))
            titles.setdefault(title, documents.of(f"{title}\n{body}"))
        gold = []
        for (title, _), at in _pairs(row, "supporting_facts", where, int):
            if title not in titles:
                raise BadInput(f"{at} names {title[:80]!r}; allowed: the title of a paragraph of its question")
            gold.append(titles[title])
        near = tuple(number for number in dict.fromkeys(titles.values()) if number not in gold)
        answer = _field(row, "answer", str, where)
        gold = tuple(dict.fromkeys(gold))
        questions.append(_asked(_field(row, "question", str, where), (answer,), gold, near, where))
    return _checked(path, documents, questions)


class _Numbers:
    """Texts by the order in which they first came."""

    def __init__(self) -> None:
        self.known: dict[str, int] = {}

    def of(self, text: str) -> int:
        return self.known.setdefault(text, len(self.known))


def _load(path: Path, kind: type[T]) -> T:
    try:
        if (size := path.stat().st_size) > LARGEST:
            raise BadInput(f"{path} has {size} bytes; allowed: at most {LARGEST}")
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise BadInput(
            f"{path}:{error.lineno}:{error.colno} is not JSON ({error.msg}); allowed: a whole file"
        ) from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 at byte {error.start}; allowed: JSON in UTF-8") from None
    except (ValueError, RecursionError):  # numbers of thousands of digits, lists in lists without end
        raise BadInput(f"{path} is not JSON that can be read; allowed: the published file") from None
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror or error}") from None
    return _is(content, kind, str(path))


def _is(value: Any, kind: type[T], where: str) -> T:
    if not isinstance(value, kind):
        raise BadInput(f"{where} is a {type(value).__name__}; allowed: a {kind.__name__}")
    return value


def _field(row: dict[str, Any], name: str, kind: type[T], where: str) -> T:
    if name not in row:
        raise BadInput(f"{where} has the fields {sorted(row)}; allowed: one of them is {name!r}")
    return _is(row[name], kind, f"{where}.{name}")


def _each(rows: list[Any], kind: type[T], where: str) -> Iterator[tuple[T, str]]:
    """The members of a list and where each is."""
    for number, row in enumerate(rows):
        at = f"{where}[{number}]"
        yield _is(row, kind, at), at


def _pairs(row: dict[str, Any], name: str, where: str, second: type) -> Iterator[tuple[tuple[str, Any], str]]:
    """The members of a list of pairs, the first of a pair being a title."""
    for pair, at in _each(_field(row, name, list, where), list, f"{where}.{name}"):
        if len(pair) != 2 or not isinstance(pair[0], str) or not isinstance(pair[1], second):
            raise BadInput(f"{at} is no pair of a title and a {second.__name__}; allowed: the published form")
        yield (pair[0], pair[1]), at


def _asked(text: str, answers: tuple[str, ...], gold: tuple[int, ...], near: tuple[int, ...], where: str) -> Asked:
    if not any(answer.strip() for answer in answers) or not gold:
        raise BadInput(f"{where} has no answer, or no paragraph that it rests on; allowed: at least one of each")
    return Asked(text, tuple(answer for answer in answers if answer.strip()), gold, near)


def _checked(path: Path, documents: _Numbers, questions: list[Asked]) -> QuestionFile:
    """What a prompt needs: a question, and at least one document beside those that an answer rests on."""
    filled = {number for text, number in documents.known.items() if text.strip()}
    if not questions or any(filled <= set(asked.gold) for asked in questions):
        raise BadInput(
            f"{path} has {len(questions)} questions about {len(filled)} paragraphs; allowed: at least one question "
            "with an answer, and a paragraph that it does not rest on"
        )
    return QuestionFile(tuple(documents.known), tuple(questions))
