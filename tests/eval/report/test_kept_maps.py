"""Claims about kept maps: shares come back within a step, only nothing looks like nothing, and sizes must agree."""

import base64
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvx.errors import BadInput
from kvx.eval.records import Kept
from kvx.eval.report import kept_maps as module
from kvx.eval.report.kept_maps import STEPS, kept_maps, packed
from tests.eval.report import example


def unpacked(text: str, count: int) -> np.ndarray:
    """Levels as the page's script reads them: a byte's high bits first."""
    found = np.frombuffer(base64.b64decode(text), np.uint8)
    return np.stack([found >> 4, found & 15], axis=1).ravel()[:count]


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=40))
def test_levels_are_within_a_step_and_the_ends_mean_none_and_all(shares):
    levels = unpacked(packed(np.array(shares)), len(shares))
    assert np.all(np.abs(levels / (STEPS - 1) - shares) <= 1 / (STEPS - 1))
    for level, share in zip(levels, shares, strict=True):
        assert (level == 0) == (share == 0.0) and (level == STEPS - 1) == (share == 1.0)


def test_maps_say_what_the_masks_say():
    kept = example.kept(48, 4)
    cells, policies = sorted({each.cell for each in kept}, key=str), sorted({each.policy for each in kept})
    found = kept_maps(kept, cells, policies)
    assert len(found["prompts"]) == len(example.TASKS)
    for each, shown in zip(kept, found["maps"], strict=True):
        assert (cells[shown["cell"]], policies[shown["policy"]]) == (each.cell, each.policy)
        prompt = found["prompts"][shown["prompt"]]
        assert tuple(prompt["tokens"]) == each.text and prompt["count"] == 48
        tokens = unpacked(shown["shares"], 48) / (STEPS - 1)
        assert np.abs(tokens - each.mask.mean(axis=(0, 1))).max() < 1 / (STEPS - 1)
        # Fewer tokens than columns: each column is a token.
        image = unpacked(shown["image"], 4 * shown["columns"]).reshape(4, -1) / (STEPS - 1)
        assert image.shape == (4, 48) and np.abs(image - each.mask.mean(axis=1)).max() < 1 / (STEPS - 1)


def test_long_prompts_show_their_ends_and_the_image_all_of_them(monkeypatch):
    monkeypatch.setattr(module, "SHOWN", 10)
    monkeypatch.setattr(module, "WIDEST", 6)
    monkeypatch.setattr(module, "NARROWEST", 2)
    mask = np.zeros((1, 1, 24), bool)
    mask[0, 0, [0, 1, 2, 3, 23]] = True
    cell = example.kept(4, 1)[0].cell
    kept = Kept(cell, "a", tuple(map(str, range(24))), ((5,),), Kept.packed(mask), mask.shape)
    found = kept_maps([kept], [cell], ["a"])
    assert found["prompts"] == [{"count": 24, "tokens": [str(place) for place in (0, 1, 2, 3, 4, 19, 20, 21, 22, 23)]}]
    (shown,) = found["maps"]
    assert unpacked(shown["shares"], 10).tolist() == [15, 15, 15, 15, 0, 0, 0, 0, 0, 15]
    # Six columns of four tokens: all of the first, a quarter of the last.
    assert shown["columns"] == 6 and unpacked(shown["image"], 6).tolist() == [15, 0, 0, 0, 0, round(15 / 4)]


def test_many_policies_share_the_room_of_images(monkeypatch):
    monkeypatch.setattr(module, "BOXES", 40_000)
    kept = example.kept(400, 5)
    found = kept_maps(kept, [each.cell for each in kept], [each.policy for each in kept])
    assert sum(each["columns"] * each["layers"] for each in found["maps"]) <= 40_000
    assert all(each["columns"] >= module.NARROWEST for each in found["maps"])


@pytest.mark.parametrize(
    "change",
    [{"text": ("a",)}, {"counts": ((1,),)}, {"bits": ""}, {"shape": (10**6, 10**6, 4)}, {"shape": (0, 3, 4)}],
)
def test_sizes_that_disagree_are_refused(change):
    kept = replace(example.kept(4, 2)[0], **change)
    with pytest.raises(BadInput, match="passkey"):
        kept_maps([kept], [kept.cell], [kept.policy])
