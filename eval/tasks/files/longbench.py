"""LongBench (Bai et al. 2024): 21 tasks of long text in English, Chinese and code, "longbench/..." each.

A file holds one object a line: {input, context, answers, all_classes, length, ...}; in a folder it is TASK.jsonl, or
TASK_e.jsonl of LongBench-E. Prompts, output limits, truncation and scores are the published ones, but for what the
metrics say. An answer's score is the best over its right answers; of four tasks only its first line counts. Six tasks
are never put into a chat template. Published lengths are the context window less about 500: 3500, 7500, 15500, 31500.
"""

from dataclasses import dataclass

from kvx.eval.metrics.classification import class_score
from kvx.eval.metrics.edit_similarity import edit_similarity
from kvx.eval.metrics.f1 import token_f1, token_f1_zh
from kvx.eval.metrics.integers import integer_share
from kvx.eval.metrics.rouge import rouge_l, rouge_l_zh
from kvx.eval.metrics.segmentation import require_segmentation
from kvx.eval.tasks.files.fitting import without_middle
from kvx.eval.tasks.files.longbench_prompts import NEW_TOKENS, PROMPTS
from kvx.eval.tasks.files.reading import Row, chosen, file_of, rows
from kvx.eval.tasks.files.template import filled
from kvx.eval.tasks.registry import Score, task
from kvx.eval.tasks.sample import Question, Sample
from kvx.eval.tasks.source import Source, one


@dataclass(frozen=True)
class Member:
    """One of the tasks.

    Attributes:
        group: as the paper groups it.
        about: one line.
        score: of the answer, or of its first line.
        plain: never in a chat template: continuing the text is the task.
        first_line: whether only the first line of an answer counts.
        stop: texts that end an answer.
    """

    group: str
    about: str
    score: Score
    plain: bool = False
    first_line: bool = False
    stop: tuple[str, ...] = ()

    def sample(self, name: str, row: Row) -> Sample:
        """A record as a prompt of any length."""
        context, text = filled(PROMPTS[name], row.text("context"), {"input": row.text("input")})
        facts = {"length": row.table.get("length")}
        if self.score is class_score:
            facts["classes"] = row.texts("all_classes")
        asked = Question(text, row.texts("answers"), new_tokens=NEW_TOKENS[name], stop=self.stop, facts=facts)
        return one(context, asked, plain=self.plain)


def first_line(answer: str) -> str:
    """The first line of an answer that says something, as it was published: line breaks before it do not count."""
    return answer.lstrip("\n").split("\n")[0]


_SINGLE, _MULTI, _SUMMARY, _SHOTS, _MADE, _CODE = (
    "single-document QA", "multi-document QA", "summarisation", "few-shot", "synthetic", "code"
)  # fmt: skip

MEMBERS = {
    "narrativeqa": Member(_SINGLE, "Questions on stories and film scripts; F1.", token_f1),
    "qasper": Member(_SINGLE, "Questions on papers of computational linguistics; F1.", token_f1),
    "multifieldqa_en": Member(_SINGLE, "Questions on articles of many fields; F1.", token_f1),
    "multifieldqa_zh": Member(_SINGLE, "Questions on Chinese articles of many fields; F1 of words.", token_f1_zh),
    "hotpotqa": Member(_MULTI, "Questions that join facts from several passages; F1.", token_f1),
    "2wikimqa": Member(_MULTI, "Questions of several hops over Wikipedia; F1.", token_f1),
    "musique": Member(_MULTI, "Questions of two to four hops over Wikipedia; F1.", token_f1),
    "dureader": Member(_MULTI, "Chinese questions on several documents; ROUGE-L of words.", rouge_l_zh),
    "gov_report": Member(_SUMMARY, "Summaries of government reports; ROUGE-L.", rouge_l),
    "qmsum": Member(_SUMMARY, "Summaries of meetings in answer to a query; ROUGE-L.", rouge_l),
    "multi_news": Member(_SUMMARY, "Summaries of several news articles; ROUGE-L.", rouge_l),
    "vcsum": Member(_SUMMARY, "Summaries of Chinese meetings; ROUGE-L of words.", rouge_l_zh),
    "trec": Member(_SHOTS, "Types of questions, by examples; class score.", class_score, True, True),
    "triviaqa": Member(_SHOTS, "Trivia, by examples; F1.", token_f1, True, True),
    "samsum": Member(_SHOTS, "Summaries of dialogues, by examples; ROUGE-L.", rouge_l, True, True, ("\n",)),
    "lsht": Member(_SHOTS, "Classes of Chinese news, by examples; class score.", class_score, True, True),
    "passage_count": Member(_MADE, "How many different paragraphs there are; share of integers.", integer_share),
    "passage_retrieval_en": Member(_MADE, "Which of 30 paragraphs an abstract is of.", integer_share),
    "passage_retrieval_zh": Member(_MADE, "Which Chinese paragraph an abstract is of.", integer_share),
    "lcc": Member(_CODE, "The next line of a long file of code; edit similarity.", edit_similarity, True),
    "repobench-p": Member(_CODE, "The next line, given code of other files; edit similarity.", edit_similarity, True),
}


def _register(name: str, member: Member) -> None:
    def make(source: Source, length: int, count: int, seed: int, *, path: str, shuffle: bool = False) -> list[Sample]:
        if member.score in (token_f1_zh, rouge_l_zh):
            require_segmentation()
        found = rows(file_of(path, (f"{name}.jsonl", f"{name}_e.jsonl")))
        return [
            without_middle(source, member.sample(name, row), length, f"longbench/{name}")
            for row in chosen(found, count, seed, shuffle)
        ]

    def score(answer: str, question: Question) -> float:
        return member.score(first_line(answer) if member.first_line else answer, question)

    make.__doc__ = member.about
    task(f"longbench/{name}", score=score, group=f"longbench {member.group}")(make)


for _name, _member in MEMBERS.items():
    _register(_name, _member)
