"""Lowering of Pallas-Triton kernels for CUDA on a machine without a GPU, as JAX offers it from 0.11 on."""

import inspect
from typing import Any

import jax

NEW_ENOUGH = jax.__version_info__ >= (0, 11)
"""Whether this JAX is one that the GPU kernels support."""


def cuda_text(function: Any, spec: Any) -> str:
    """The program of `function` with implementation="triton" for the shapes of an `ArgSpec`."""
    from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

    device = {"device_kind": "NVIDIA H100 80GB HBM3", "num_cores": None}
    if "platform" in inspect.signature(AbstractDevice).parameters:
        device["platform"] = "cuda"
    mesh, inputs = AbstractMesh((1,), ("x",), abstract_device=AbstractDevice(**device)), spec.described()
    jitted = jax.jit(lambda leaves: function(**inputs.of(leaves), **spec.options, implementation="triton"))
    with use_abstract_mesh(mesh):
        return jitted.trace(inputs.shapes).lower(lowering_platforms=("cuda",)).as_text()
