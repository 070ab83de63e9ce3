"""What a run or a curve was begun with is what it goes on with; what differs is told with both values."""

from dataclasses import replace

import pytest

from kvx.errors import BadInput
from kvx.train.begun import check_begun, flat
from kvx.train.job import Job
from kvx.train.run_folder import check_folder, claim
from kvx.train.stage import LossSection, StageSection


@pytest.fixture
def begun(tmp_path) -> Job:
    """A job of two stages whose run is begun."""
    stages = StageSection(steps=3, loss=LossSection(ce=0.5)), StageSection(steps=4)
    job = Job("a", "model", stages, output=str(tmp_path / "run"))
    claim(job)
    return job


def test_values_are_known_by_the_paths_that_lead_to_them():
    table = {"a": {"b": 1, "c": [{"d": 2}, {"d": 3}]}, "e": [0.9, 0.99], "f": []}
    found = {"a.b": 1, "a.c.0.d": 2, "a.c.1.d": 3, "e": [0.9, 0.99], "f": []}
    assert flat(table) == found == flat(found)


def test_a_run_goes_on_as_it_was_begun_but_for_what_may_change(begun):
    check_folder(begun, resume=True)
    gentler = replace(begun.stages[1], learning_rate=1e-6)
    check_folder(replace(begun, stages=(begun.stages[0], gentler)), resume=True)


def test_what_differs_is_told_by_its_path_with_both_values(begun):
    first, second = begun.stages
    changed = {
        r"stages\.1\.steps=9, but the run in .*run' was begun with 4; allowed: changes of mesh": (
            {"stages": (first, replace(second, steps=9))}
        ),
        r"stages\.0\.loss\.ce=0\.0, but .* begun with 0\.5": {"stages": (replace(first, loss=LossSection()), second)},
        r"stages\.1\..*=None, but .* begun with ": {"stages": (first,)},
        "seed=1, but .* begun with 0": {"seed": 1},
    }
    for sentence, changes in changed.items():
        with pytest.raises(BadInput, match=sentence):
            check_folder(replace(begun, **changes), resume=True)


def test_a_damaged_record_is_told(begun, tmp_path):
    for damage in ("{", "[1]", "{}", '{"stages": 3}'):
        (tmp_path / "run" / "job.json").write_text(damage)
        with pytest.raises(BadInput, match=r"job\.json is damaged"):
            check_folder(begun, resume=True)
    (tmp_path / "setting.json").write_text("3")
    with pytest.raises(BadInput, match=r"setting\.json is damaged"):
        check_begun(tmp_path / "setting.json", {}, "the curve", "the same")


def test_what_was_not_begun_cannot_go_on(begun, tmp_path):
    other = replace(begun, output=str(tmp_path / "typo"))
    with pytest.raises(BadInput, match="typo' holds no run; allowed: no --resume, or the folder of a run"):
        check_folder(other, resume=True)
    check_folder(other, resume=False)
    with pytest.raises(BadInput, match="holds a run; allowed: --resume"):
        check_folder(begun, resume=False)
