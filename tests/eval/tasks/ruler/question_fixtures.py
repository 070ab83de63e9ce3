"""Small files of the form of SQuAD v2 and HotpotQA, with paragraphs of made-up facts."""

import json
from pathlib import Path

ARTICLES, PARAGRAPHS = 4, 5


def paragraph(article: int, number: int) -> str:
    """A paragraph of some forty words."""
    filler = " ".join(
        f"The {word} of town {article} was built in stone." for word in ("hall", "tower", "bridge", "gate")
    )
    return f"Town {article} has {number + 2} wells. Its mayor number {number} is Mayor{article}x{number}.\n{filler}"


def squad(folder: Path, change=lambda table: None) -> Path:
    """Every paragraph has a question with two right answers, and one that has none."""
    data = [
        {
            "title": f"Town_{article}",
            "paragraphs": [
                {
                    "context": paragraph(article, number),
                    "qas": [
                        {
                            "id": f"{article}-{number}-no",
                            "question": "Who is the king?",
                            "answers": [],
                            "plausible_answers": [{"text": "Town", "answer_start": 0}],
                            "is_impossible": True,
                        },
                        {
                            "id": f"{article}-{number}",
                            "question": f"Who is mayor number {number} of town {article}?",
                            "answers": [
                                {"text": f"Mayor{article}x{number}", "answer_start": 40},
                                {"text": f"mayor number {number}", "answer_start": 25},
                                {"text": f"Mayor{article}x{number}", "answer_start": 40},
                            ],
                            "is_impossible": False,
                        },
                    ],
                }
                for number in range(PARAGRAPHS)
            ],
        }
        for article in range(ARTICLES)
    ]
    return _written(folder / "dev-v2.0.json", {"version": "v2.0", "data": data}, change)


def hotpot(folder: Path, change=lambda table: None) -> Path:
    """Each question rests on the first and the last of its article's paragraphs."""
    rows = [
        {
            "_id": str(article),
            "question": f"Is mayor number 0 of town {article} related to its last mayor?",
            "answer": f"cousin of Mayor{article}x0",
            "supporting_facts": [[f"Last {article}", 0], [f"First {article}", 1], [f"First {article}", 0]],
            "context": [
                [title, [f"{sentence}." for sentence in paragraph(article, number).split(".") if sentence]]
                for number, title in enumerate([f"First {article}", *(f"More {article} {n}" for n in "abc"),
                                                f"Last {article}"])
            ],
            "type": "bridge",
            "level": "hard",
        }
        for article in range(ARTICLES)
    ]  # fmt: skip
    return _written(folder / "hotpot.json", rows, change)


def _written(path: Path, table, change) -> Path:
    change(table)
    path.write_text(json.dumps(table, indent=1), encoding="utf-8")
    return path
