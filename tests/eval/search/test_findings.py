"""Claims about what a search leaves: a configuration that reads back as it was meant, a picture, and live words."""

import io
import tomllib

from rich.console import Console

from kvx.eval.job import EvalJob
from kvx.eval.search.findings import as_config
from kvx.eval.search.job import SearchJob
from kvx.eval.search.loop import search
from kvx.eval.search.picture import frontier_png
from kvx.eval.search.progress import Watch, so_far
from kvx.eval.search.space import Space
from kvx.section_file import section_from
from tests.eval.search.synthetic import Synthetic


def found(tell=lambda *_: None):
    return search(Space.of(only=("snapkv", "kivi")), Synthetic(), 300.0, 12, tell=tell)


def test_the_configuration_reads_back_as_the_evaluation_of_the_frontier():
    job = SearchJob(
        300.0,
        task="key_value",
        options={"digits": 6},
        samples=9,
        seed=4,
        chat=True,
        text='a "folder"',
        calibration=(2, 64),
    )
    what = found()
    text = as_config(job, what)
    again = section_from(EvalJob, tomllib.loads(text))
    assert again.policies == tuple(point.name for point in what.frontier)
    assert again.tasks == job.evaluation().tasks and again.text == 'a "folder"'
    assert (again.seed, again.chat, again.calibration, again.output) == (4, True, (2, 64), None)
    assert "cost" not in text  # defaults are left unsaid


def test_the_picture_shows_every_point_of_the_frontier_whatever_its_name():
    what = found()
    assert frontier_png(what, "a $title$ with _marks_", "score").startswith(b"\x89PNG")


def test_progress_names_what_begins_and_the_best_so_far():
    shown = io.StringIO()
    with Watch(12, Console(file=shown, width=200)) as watch:
        what = found(watch)
    lines = shown.getvalue().splitlines()
    assert "size every method" in lines[0] and "best so far" in lines[-1]
    assert so_far(what)[-1].quality >= what.frontier[-1].quality - 0.2


def test_on_a_terminal_the_bar_stands_above_the_frontier():
    shown = io.StringIO()
    with Watch(12, Console(file=shown, width=160, force_terminal=True)) as watch:
        what = found(watch)
        watch(what, "done")
    assert "12/12" in shown.getvalue() and what.frontier[-1].name in shown.getvalue()
