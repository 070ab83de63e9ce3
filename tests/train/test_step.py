"""Claims about the training step: meshes, accumulation, precision, what trains, clipping, and the running mean."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kvx.train.job import LossSection
from kvx.train.windows import Windows
from tests.train.tiny_runs import LENGTH, curve, make_step, mesh, one_device, stage, text


def batches(count, rows=8):
    windows = Windows(text(), LENGTH, rows)
    return [next(windows) for _ in range(count)]


def stepped(section, placement, count, rows=8):
    """The state after a few steps, what was frozen, and every step's numbers."""
    step, state, frozen, teacher = make_step(section, placement)
    found = []
    for batch in batches(count, rows):
        state, numbers = step(state, frozen, teacher, step.place_batch(batch))
        found.append({name: float(number) for name, number in numbers.items()})
    return step, state, frozen, found


@pytest.mark.parametrize(
    "axes",
    [
        {"data": 2, "fsdp": 2, "tensor": 2},
        pytest.param({"data": 2, "fsdp": 4}, marks=pytest.mark.slow),
        pytest.param({"data": 2, "tensor": 2, "sequence": 2}, marks=pytest.mark.slow),
    ],
)
def test_a_mesh_has_the_loss_curve_of_one_device(axes):
    """Float32 sums in another order: 1e-7 a step, which Adam's early steps may raise a hundredfold."""
    one, many = curve(stage(), one_device()), curve(stage(), mesh(**axes))
    np.testing.assert_allclose(one, many, atol=1e-4)
    assert one[-1] < one[0] - 0.5, "a curve that does not fall proves little"


@pytest.mark.slow
def test_a_mesh_has_the_loss_curve_of_one_device_in_bfloat16_without_drift():
    """Products are rounded to 8 bits in other places; the mean difference would show a drift."""
    section = stage(compute_dtype="bfloat16")
    apart = curve(section, one_device()) - curve(section, mesh(data=2, fsdp=2, tensor=2))
    assert np.abs(apart).max() < 3e-2
    assert abs(apart[25:].mean()) < 1e-2


def test_weights_lie_on_the_mesh_and_so_does_their_optimizer_state():
    _, state, _, _ = stepped(stage(), mesh(data=2, fsdp=2, tensor=2), 1)
    name = "blocks.0.mlp.gate_up.kernel"
    first = optax.tree.get(state.optimizer, "mu")[name]
    assert (
        state.trained[name].sharding.spec == first.sharding.spec == jax.sharding.PartitionSpec("fsdp", None, "tensor")
    )
    assert state.trained[name].addressable_shards[0].data.size * 4 == state.trained[name].size


def test_parts_of_a_batch_add_up_to_the_batch():
    """Also where the parts count different numbers of tokens; gradients to 1e-6 of float32 sums in another order."""
    batch = batches(1)[0]
    batch.mask[3, 5:] = False
    found = []
    for parts in (1, 2, 4):
        step, state, frozen, teacher = make_step(stage(accumulate=parts, clip=None), one_device())
        found.append(jax.jit(step.gradients)(state.trained, frozen, teacher, step.place_batch(batch)))
    for gradients, numbers in found[1:]:
        assert float(numbers["counted"]) == 7 * (LENGTH - 1) + 4
        np.testing.assert_allclose(numbers["loss"], found[0][1]["loss"], rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gradients, found[0][0])


@pytest.mark.parametrize("train", ["attention", r"blocks\.1\.mlp"])
def test_frozen_parameters_stay_bit_for_bit_and_have_no_optimizer_state(train):
    step, state, frozen, teacher = make_step(stage(train=train), one_device())
    begun = {name: np.asarray(array) for name, array in {**frozen, **state.trained}.items()}
    for batch in batches(3):
        state, _ = step(state, frozen, teacher, step.place_batch(batch))
    moved = {name for name, array in step.student(state, frozen).items() if not np.array_equal(begun[name], array)}
    assert moved == set(step.names) < step.frame.parameters
    assert optax.tree.get(state.optimizer, "mu").keys() == set(step.names)


def test_a_lone_document_is_the_same_with_and_without_padding_or_neighbours():
    """The loss of a document, alone in a row, behind another one, and before padding."""
    step, state, frozen, teacher = make_step(stage(), one_device())
    batch = batches(1)[0]
    half = LENGTH // 2
    alone = jax.tree.map(lambda array: array[:, :half].copy(), batch)
    padded = jax.tree.map(np.copy, batch)
    padded.segments[:, half:] = 0
    padded.mask[:, half:] = False
    packed = jax.tree.map(np.copy, batch)
    packed.tokens[:, half:] = batch.tokens[:, :half]
    packed.tokens[:, :half] = 7
    packed.segments[:, half:] = 2
    packed.positions[:, half:] = batch.positions[:, :half]
    packed.mask[:, :half] = False
    losses = [
        jax.jit(step.gradients)(state.trained, frozen, teacher, step.place_batch(each))
        for each in (alone, padded, packed)
    ]
    for gradients, numbers in losses[1:]:
        np.testing.assert_allclose(numbers["loss"], losses[0][1]["loss"], rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), gradients, losses[0][0])


def test_a_gradient_is_clipped_to_its_global_norm():
    """Adam is blind to the scale of all gradients but not to that of one step among others, so its moments show it."""
    _, loose, _, numbers = stepped(stage(clip=None), one_device(), 1)
    _, tight, _, _ = stepped(stage(clip=0.01), one_device(), 1)
    norm = numbers[0]["gradient_norm"]
    assert norm > 0.01
    whole, cut = (optax.tree.get(state.optimizer, "mu") for state in (loose, tight))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a * (0.01 / norm), b, rtol=1e-4, atol=1e-9), whole, cut)


def test_the_running_mean_has_its_closed_form():
    """m_n = d^n w_0 + (1 - d) sum_i d^(n - i) w_i."""
    decay, weights = 0.8, []
    step, state, frozen, teacher = make_step(stage(ema=decay), one_device())
    name = "blocks.0.mlp.down.kernel"
    for batch in [None, *batches(3)]:
        if batch is not None:
            state, _ = step(state, frozen, teacher, step.place_batch(batch))
        weights.append(np.asarray(state.trained[name], np.float64))
    factors = [decay**3] + [(1 - decay) * decay ** (3 - i) for i in (1, 2, 3)]
    expected = sum(factor * weight for factor, weight in zip(factors, weights, strict=True))
    np.testing.assert_allclose(step.student(state, frozen)[name], expected, atol=1e-6)


def test_recomputing_activations_changes_nothing():
    kept, recomputed = (curve(stage(remat=remat), one_device(), 3) for remat in (False, True))
    np.testing.assert_allclose(kept, recomputed, rtol=1e-5)


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it():
    section = stage(loss=LossSection(kl=1.0, hidden=1.0, relation=1.0, chunk=64))
    step, state, frozen, _ = make_step(section, one_device())
    itself = {**frozen, **{name: jnp.copy(array) for name, array in state.trained.items()}}
    gradients, numbers = jax.jit(step.gradients)(state.trained, frozen, itself, step.place_batch(batches(1)[0]))
    assert {"kl", "hidden", "relation"} <= numbers.keys()
    assert abs(float(numbers["loss"])) < 1e-6
    assert float(optax.tree.norm(gradients)) < 1e-5


def test_what_the_caller_gave_is_not_used_up():
    step, state, frozen, teacher = make_step(stage(), one_device())
    from tests.train.tiny_runs import models

    step(state, frozen, teacher, step.place_batch(batches(1)[0]))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(models()[0]))
