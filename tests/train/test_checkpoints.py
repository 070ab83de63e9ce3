"""Claims about checkpoints: what is written comes back on any mesh, damage is named, and only whole ones count."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvx.errors import BadInput
from kvx.train import manifest
from kvx.train.checkpoints import Checkpoints
from kvx.train.job import CheckpointSection
from kvx.train.step import abstract
from tests.train.tiny_runs import make_step, mesh, one_device, stage


def tree(scale=1.0):
    """Two arrays, one of them in bfloat16."""
    return {"a": jnp.arange(12.0).reshape(3, 4) * scale, "b": (jnp.ones((5,), jnp.bfloat16) * scale,)}


def saved(folder, *steps, keep=3, losses=()):
    """Checkpoints of these steps, finished."""
    checkpoints = Checkpoints(folder, CheckpointSection(keep=keep))
    for place, step in enumerate(steps):
        held_out = losses[place] if losses else None
        checkpoints.save(step, tree(step), {"held_out": held_out}, {"taken": step})
    checkpoints.close()
    return checkpoints


def restored(checkpoints):
    return checkpoints.restore(checkpoints.newest(), abstract(tree()))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder with checkpoints of steps 1 and 2, to be copied."""
    folder = tmp_path_factory.mktemp("run")
    saved(folder, 1, 2)
    return folder


@pytest.fixture
def copy(two, tmp_path):
    shutil.copytree(two, tmp_path / "run")
    return tmp_path / "run"


def files(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def test_a_checkpoint_gives_back_its_arrays_its_facts_and_the_place_in_the_data(two):
    found, facts, data = restored(Checkpoints(two))
    jax.tree.map(np.testing.assert_array_equal, found, tree(2))
    assert found["b"][0].dtype == jnp.bfloat16
    assert facts == {"step": 2, "held_out": None} and data == {"taken": 2}


def test_a_flipped_bit_in_any_file_is_refused_by_name_and_the_one_before_is_offered(copy):
    newest = copy / "step-00000002"
    names = files(newest)
    assert len(names) > 5 and any("arrays" in str(name) for name in names)
    for name in names:
        whole = (newest / name).read_bytes()
        if not whole:
            continue
        broken = bytearray(whole)
        broken[len(broken) // 2] ^= 1
        (newest / name).write_bytes(broken)
        with pytest.raises(BadInput) as refusal:
            Checkpoints(copy).newest()
        assert repr(name.as_posix()) in str(refusal.value)
        assert "resume from step 1, the newest that is whole" in str(refusal.value)
        (newest / name).write_bytes(whole)
    assert Checkpoints(copy).newest() == 2


def test_a_missing_an_emptied_and_a_foreign_file_are_refused_by_name(copy):
    newest = copy / "step-00000002"
    for name in files(newest):
        if name.name == manifest.NAME:
            continue
        whole = (newest / name).read_bytes()
        (newest / name).unlink()
        with pytest.raises(BadInput, match="is missing; allowed: resume from step 1"):
            Checkpoints(copy).newest()
        (newest / name).write_bytes(whole)
    (newest / "arrays" / "more").write_text("?")
    with pytest.raises(BadInput, match="'arrays/more' does not belong there"):
        Checkpoints(copy).newest()


def test_the_offer_passes_over_damage_and_the_checkpoint_that_is_offered_restores(copy):
    saved(copy, 3)
    for step in (2, 3):
        (copy / f"step-0000000{step}" / "facts.json").write_text("{}")
    with pytest.raises(BadInput, match="resume from step 1"):
        Checkpoints(copy).newest()
    for step in (2, 3):
        shutil.move(copy / f"step-0000000{step}", copy / f"away-{step}")
    found, facts, _ = restored(Checkpoints(copy))
    assert facts["step"] == 1
    jax.tree.map(np.testing.assert_array_equal, found, tree(1))
    (copy / "step-00000001" / "facts.json").write_text("{}")
    with pytest.raises(BadInput, match="none before it is whole"):
        Checkpoints(copy).newest()


def test_a_checkpoint_without_a_manifest_does_not_count_and_is_cleared_away(copy):
    (copy / "step-00000002" / manifest.NAME).unlink()
    checkpoints = Checkpoints(copy)
    assert checkpoints.steps() == [1] and checkpoints.newest() == 1
    checkpoints.clear_unfinished()
    assert [path.name for path in copy.iterdir()] == ["step-00000001"]


def test_the_newest_stay_and_so_does_the_best(tmp_path):
    checkpoints = saved(tmp_path, 1, 2, 3, 4, 5, keep=2, losses=(3.0, 1.0, 2.0, None, 1.5))
    assert checkpoints.steps() == [2, 4, 5]
    assert Checkpoints(tmp_path).newest() == 5


def test_a_failure_in_the_background_is_raised_where_the_run_waits(tmp_path, monkeypatch):
    def full(folder):
        raise OSError("no space left on device")

    monkeypatch.setattr(manifest, "write", full)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, tree(), {}, {})
    with pytest.raises(OSError, match="no space left"):
        checkpoints.wait()
    assert checkpoints.steps() == []
    checkpoints.close()


def test_the_state_of_a_step_restores_on_another_mesh_bit_for_bit(tmp_path):
    """Written by one device, read on eight, and the other way round."""
    for number, (there, here) in enumerate([(one_device, eight), (eight, one_device)]):
        _, state, frozen, _ = make_step(stage(ema=0.9, train=r"blocks\.0"), there())
        checkpoints = Checkpoints(tmp_path / str(number))
        checkpoints.save(7, (state, frozen), {}, {})
        checkpoints.wait()
        other, begun, still, _ = make_step(stage(ema=0.9, train=r"blocks\.0"), here())
        (found, kept), facts, _ = checkpoints.restore(7, abstract((begun, still)))
        checkpoints.close()
        assert json.loads(json.dumps(facts))["step"] == 7
        jax.tree.map(np.testing.assert_array_equal, (found, kept), (state, frozen))
        name = "blocks.0.mlp.gate_up.kernel"
        wanted = other.frame.placed(here(), {name: begun.trained[name]})[name].sharding
        assert found.trained[name].sharding.is_equivalent_to(wanted, found.trained[name].ndim)


def eight():
    return mesh(data=2, fsdp=2, tensor=2)
