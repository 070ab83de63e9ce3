"""Claims about the picture: a point at every power of two that the model reaches, falling to the right."""

import json

import pytest

from kvx.errors import BadInput
from kvx.eval.plan.chips import find_chip
from kvx.eval.plan.planning import Job, Planner
from kvx.eval.plan.plot import batches_png, checked_png, largest_batches
from kvx.eval.plan.roofline import Machine
from kvx.generate import full_policy
from tests.tiny import CONFIG


def test_batches_fall_as_prompts_grow(tmp_path):
    path = tmp_path / "model.json"
    path.write_text(json.dumps({**CONFIG, "max_position_embeddings": 1200, "num_hidden_layers": 2}))
    planner = Planner(Job(str(path), Machine(find_chip("v5e")), 512))
    points = largest_batches(planner, full_policy())
    assert [length for length, _ in points] == [512, 1024]
    assert sorted((batch for _, batch in points), reverse=True) == [batch for _, batch in points]
    assert batches_png(planner, [full_policy()]).startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["plan.pdf", "missing/plan.png", "."])
def test_a_picture_goes_to_a_png_in_a_folder(tmp_path, name):
    with pytest.raises(BadInput, match=r"allowed: a (\.png )?file in a folder that exists"):
        checked_png(tmp_path / name)
    assert checked_png(tmp_path / "plan.png") == tmp_path / "plan.png"
