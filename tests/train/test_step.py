"""Claims about the training step: meshes, accumulation, precision, what trains, clipping, and the running mean."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kvx.train.stage import LossSection
from kvx.train.windows import Windows
from tests import tiny, tiny_latent
from tests.train.tiny_runs import LENGTH, Squares, curve, make_step, mesh, models, one_device, stage, text

DOWN = ("blocks.0.mlp.down.kernel", "blocks.1.mlp.down.kernel")
"""What `Squares` moves."""


def batches(count, rows=8):
    windows = Windows(text(), LENGTH, rows)
    return [next(windows) for _ in range(count)]


def squares(placement=None, **changes):
    """A step that compiles at once."""
    return make_step(stage(**changes), placement or one_device(), minimised=Squares())


def stepped(count, **changes):
    """The state after a few steps, what was frozen, and every step's numbers."""
    step, state, frozen, teacher = squares(**changes)
    found = []
    for batch in batches(count):
        state, numbers = step(state, frozen, teacher, step.place_batch(batch))
        found.append({name: float(number) for name, number in numbers.items()})
    return step, state, frozen, found


def gradients(made, batch):
    """Of a made step, and its numbers."""
    step, state, frozen, teacher = made
    return jax.jit(step.gradients)(state.trained, frozen, teacher, step.place_batch(batch))


@pytest.mark.slow
def test_a_mesh_has_the_loss_curve_of_one_device_for_a_while():
    """Float32 sums in another order: 1e-7 a step, which Adam's early steps may raise a hundredfold."""
    section = stage(steps=12, loss=LossSection(ce=1.0, kl=0.0, chunk=64))
    one, many = curve(section, one_device()), curve(section, mesh(data=2, fsdp=2, tensor=2))
    np.testing.assert_allclose(one, many, atol=1e-5)
    assert one[-1] < one[0] - 0.2, "a curve that does not fall proves little"


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "axes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"data": 2, "fsdp": 4}, {"data": 2, "tensor": 2, "sequence": 2}]
)
def test_a_mesh_has_the_loss_curve_of_one_device(axes, packed):
    """With a teacher over 50 steps, as above."""
    one, many = (curve(stage(), each, packed=packed) for each in (one_device(), mesh(**axes)))
    np.testing.assert_allclose(one, many, atol=1e-4)
    assert one[-1] < one[0] - 0.3, "a curve that does not fall proves little"


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2, "tensor": 2, "sequence": 2}])
def test_latent_layers_among_plain_ones_have_the_loss_curve_of_one_device(axes):
    """Latents and rotary keys are whole on every device, heads split: the same sums in another order."""
    pair = tiny_latent.model("norms and a query rank", latent=(0, 2)), tiny.model()
    one, many = (curve(stage(), each, packed=True, pair=pair) for each in (one_device(), mesh(**axes)))
    np.testing.assert_allclose(one, many, atol=1e-4)
    assert one[-1] < one[0] - 0.3, "a curve that does not fall proves little"


@pytest.mark.slow
def test_a_mesh_has_the_loss_curve_of_one_device_in_bfloat16_without_drift():
    """Products are rounded to 8 bits in other places; the mean difference would show a drift."""
    section = stage(compute_dtype="bfloat16")
    apart = curve(section, one_device()) - curve(section, mesh(data=2, fsdp=2, tensor=2))
    assert np.abs(apart).max() < 3e-2
    assert abs(apart[25:].mean()) < 1e-2


def test_weights_lie_on_the_mesh_and_so_does_their_optimizer_state():
    step, state, frozen, teacher = squares(mesh(data=2, fsdp=2, tensor=2))
    state, _ = step(state, frozen, teacher, step.place_batch(batches(1)[0]))
    for arrays in (state.trained, optax.tree.get(state.optimizer, "mu")):
        assert arrays[DOWN[0]].sharding.spec == jax.sharding.PartitionSpec("tensor", "fsdp")
        assert arrays[DOWN[0]].addressable_shards[0].data.size * 4 == arrays[DOWN[0]].size


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_parts_of_a_batch_add_up_to_the_batch(real):
    """Also where the parts count different numbers of tokens; float32 sums in another order, of gradients below 1."""
    batch = batches(1)[0]
    batch.mask[3, 0 if not real else 5 :] = False
    made = (make_step(stage(accumulate=n), one_device(), minimised=None if real else Squares()) for n in (1, 2, 4))
    found = [gradients(each, batch) for each in made]
    for each, numbers in found[1:]:
        assert float(numbers["counted"]) == (7 * (LENGTH - 1) + 4 if real else 7)
        np.testing.assert_allclose(numbers["loss"], found[0][1]["loss"], rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), each, found[0][0])


def test_parts_of_a_batch_add_up_on_a_mesh_too():
    batch = batches(1)[0]
    one, many = (gradients(squares(each, accumulate=2), batch) for each in (one_device(), mesh(2, data=2)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one, many)


@pytest.mark.parametrize("train", ["attention", r"blocks\.1\.mlp", "all"])
def test_frozen_parameters_stay_bit_for_bit_and_have_no_optimizer_state(train):
    step, state, frozen, _ = stepped(3, train=train)
    frame, student = step.frame, models()[0]
    begun = frame.arrays(student)
    moved = {name for name, array in step.student(state, frozen).items() if not np.array_equal(begun[name], array)}
    assert moved == set(DOWN) & set(step.names)
    assert optax.tree.get(state.optimizer, "mu").keys() == set(step.names) == set(state.trained)


@pytest.mark.slow
def test_training_moves_what_is_chosen_and_nothing_else():
    """With the real losses: all of the attention, none of the rest."""
    step, state, frozen, teacher = make_step(stage(train="attention"), one_device())
    begun = step.frame.arrays(models()[0])
    for batch in batches(3):
        state, _ = step(state, frozen, teacher, step.place_batch(batch))
    moved = {name for name, array in step.student(state, frozen).items() if not np.array_equal(begun[name], array)}
    assert moved == set(step.names) == {name for name in step.frame.parameters if ".attention." in name}


@pytest.mark.slow
def test_a_lone_document_is_the_same_with_and_without_padding_or_neighbours():
    """The loss of a document, alone in a row, behind another one, and before padding."""
    made, batch, half = make_step(stage(), one_device()), replace(batches(1)[0], packed=True), LENGTH // 2
    alone = jax.tree.map(lambda array: array[:, :half].copy(), batch)
    padded, packed = (jax.tree.map(np.array, batch) for _ in range(2))
    padded.segments[:, half:] = 0
    padded.mask[:, half:] = False
    packed.tokens[:] = np.concatenate([np.full_like(alone.tokens, 7), alone.tokens], axis=1)
    packed.segments[:, half:] = 2
    packed.positions[:, half:] = alone.positions
    packed.mask[:, :half] = False
    found = [gradients(made, each) for each in (alone, padded, packed)]
    for each, numbers in found[1:]:
        np.testing.assert_allclose(numbers["loss"], found[0][1]["loss"], rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), each, found[0][0])


def test_a_gradient_is_clipped_to_its_global_norm():
    """Adam's first moment is the gradient, times 1 - beta: it shows what came through."""
    _, loose, _, numbers = stepped(1, clip=None)
    _, tight, _, _ = stepped(1, clip=0.01)
    norm = numbers[0]["gradient_norm"]
    assert norm > 0.01
    whole, cut = (optax.tree.get(state.optimizer, "mu") for state in (loose, tight))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a * (0.01 / norm), b, rtol=1e-4, atol=1e-9), whole, cut)


def test_the_running_mean_has_its_closed_form():
    """m_n = d^n w_0 + (1 - d) sum_i d^(n - i) w_i; float32 against float64."""
    decay, weights = 0.8, []
    step, state, frozen, teacher = squares(ema=decay)
    for batch in [None, *batches(3)]:
        if batch is not None:
            state, _ = step(state, frozen, teacher, step.place_batch(batch))
        weights.append(np.asarray(state.trained[DOWN[0]], np.float64))
    factors = [decay**3] + [(1 - decay) * decay ** (3 - i) for i in (1, 2, 3)]
    expected = sum(factor * weight for factor, weight in zip(factors, weights, strict=True))
    np.testing.assert_allclose(step.student(state, frozen)[DOWN[0]], expected, atol=1e-6)


@pytest.mark.slow
def test_recomputing_activations_changes_nothing():
    kept, *recomputed = (curve(stage(remat=remat), one_device(), 3) for remat in ("none", "dots", "full"))
    for each in recomputed:
        np.testing.assert_allclose(kept, each, rtol=1e-5)


@pytest.mark.slow
def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it():
    section = stage(loss=LossSection(kl=1.0, hidden=1.0, relation=1.0, chunk=64))
    step, state, frozen, _ = make_step(section, one_device())
    itself = {**frozen, **{name: jnp.copy(array) for name, array in state.trained.items()}}
    found, numbers = gradients((step, state, frozen, itself), batches(1)[0])
    assert {"kl", "hidden", "relation"} <= numbers.keys()
    assert abs(float(numbers["loss"])) < 1e-6
    assert float(optax.tree.norm(found)) < 1e-5


def test_what_the_caller_gave_is_not_used_up():
    stepped(1)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(models()))
