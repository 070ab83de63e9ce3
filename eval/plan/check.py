"""A plan beside the TPU compiler: the decode step and the prefill's programs compiled for a chip that is not there."""

import os
import time
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from kvx.errors import BadInput
from kvx.eval.cost.live_bytes import Scratch, most_alive
from kvx.eval.plan.abstract import AbstractPrefill
from kvx.eval.plan.chips import Chip
from kvx.eval.plan.planning import Planner
from kvx.kernels.implementations import compiling_for
from kvx.mesh import place_cache, place_model, placement_of
from kvx.policy import Policy
from kvx.step import decode

_FULL = "RESOURCE_EXHAUSTED"


@dataclass(frozen=True)
class Checked:
    """What the compiler said, in bytes on one chip.

    Attributes:
        policy: its text.
        topology: that was compiled for; of its chips, as many as were planned with.
        predicted: weights and cache by the plan.
        arguments: of the decode step by the compiler: weights, cache and a token a row.
        temporaries: of the decode step. What is of the cache's size is a copy of it, which each step makes anew.
        prefill_peak: arrays between the programs of the prefill, weights, and each program's scratch, at its largest;
            None on several chips, where the prefill is not compiled.
        seconds: that compilation took.
        refusal: the compiler's own words if a program does not fit; figures that are not known are then 0 or None.
    """

    policy: str
    topology: str
    predicted: int
    arguments: int
    temporaries: int
    prefill_peak: int | None
    seconds: float
    refusal: str | None = None

    @property
    def error(self) -> float:
        """The plan's error, as a share of what the compiler counts."""
        return self.predicted / self.arguments - 1 if self.arguments else float("nan")

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self) | {"error": None if self.refusal else self.error}


def check(planner: Planner, policy: Policy) -> Checked:
    """Compile a policy's decode step, and on one chip its prefill, at the plan's shape.

    Only one process on a machine may hold the TPU compiler. A model of many layers takes minutes.

    Raises:
        BadInput: a chip that no compiler at hand makes programs for, more chips than a topology has, no TPU compiler.
    """
    job = planner.job
    topology = topology_of(job.machine.chip, job.machine.chips)
    devices = _devices(topology)[: job.machine.chips]
    prefill = planner.prefill(policy, planner.context, job.batch)
    cache = planner.split.cache(prefill.cache, job.batch, planner.kv_heads)
    predicted = planner.split.parameters(planner.model) + cache.device
    # What was traced for this machine chose this machine's kernels: the compiler of another must not find it.
    jax.clear_caches()
    begin = time.perf_counter()
    try:
        with compiling_for("tpu"):
            arguments, temporaries = _decode_step(planner, policy, prefill, devices)
            peak = _prefill_peak(planner, policy, devices[0]) if len(devices) == 1 else None
    except jax.errors.JaxRuntimeError as error:
        if _FULL not in str(error):
            raise
        seconds, refusal = time.perf_counter() - begin, " ".join(str(error).split())[:300]
        return Checked(policy.text, topology, predicted, 0, 0, None, seconds, refusal)
    finally:
        jax.clear_caches()
    return Checked(policy.text, topology, predicted, arguments, temporaries, peak, time.perf_counter() - begin)


def topology_of(chip: Chip, chips: int) -> str:
    """The smallest topology with that many chips.

    Raises:
        BadInput: none.
    """
    if not chip.topologies:
        raise BadInput(f"chip={chip.name!r} has no compiler that works without it; allowed with --check: a TPU")
    found = [name for count, name in chip.topologies if count >= chips]
    if not found:
        raise BadInput(f"chips={chips} is out of range; allowed with --check: 1 to {chip.topologies[-1][0]}")
    return found[0]


def _decode_step(planner: Planner, policy: Policy, prefill: AbstractPrefill, devices: list[Any]) -> tuple[int, int]:
    """Bytes of a decode step's arguments and temporaries on a chip."""
    model = place_model(planner.model, Mesh(np.asarray(devices), ("tensor",)))
    placement = placement_of(model)
    assert placement is not None, "the model was placed"
    batch = planner.job.batch
    shapes = jax.tree.unflatten(prefill.tree, [part.array for part in prefill.cache])
    cache = place_cache(placement, shapes, batch, planner.kv_heads)
    token = placement.put(jax.ShapeDtypeStruct((batch,), jnp.int32), ("rows",))

    def step(model: Any, token: Any, cache: Any) -> Any:
        return decode(model, token, cache, policy, jnp.ones(batch, bool))

    compiled = jax.jit(step, donate_argnames="cache").lower(model, token, cache).compile()
    sizes = compiled.memory_analysis()
    assert sizes is not None, "TPU programs have it"
    return sizes.argument_size_in_bytes, sizes.temp_size_in_bytes


def _prefill_peak(planner: Planner, policy: Policy, device: Any) -> int:
    """Bytes on one chip while prompts are read and packed."""
    job = planner.job
    trace = planner.prefill(policy, planner.context, job.batch).trace
    alive = most_alive(
        trace,
        lambda aval: planner.split.array(aval, job.batch, planner.kv_heads),
        Scratch(SingleDeviceSharding(device)),
    )
    return planner.split.parameters(planner.model) + alive


def _devices(topology: str) -> list[Any]:
    # Without it libtpu asks a cloud's metadata server who this machine is.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(topology, platform="tpu").devices)
    except (ModuleNotFoundError, jax.errors.JaxRuntimeError, RuntimeError, ValueError) as error:
        raise BadInput(
            f"the TPU compiler cannot be used for {topology}: {' '.join(str(error).split())[:300]}; "
            "allowed: pip install 'kvx[aot]', and no other process that uses it"
        ) from None
