"""An implementation of prefill attention against the float32 reference on the same inputs."""

import jax
import numpy as np

from kvx.kernels.prefill_attention import prefill_attention


def check_numeric(spec, implementation, **named):
    """Every result within the entry's tolerance of the reference, relative to its largest finite value."""
    arrays = spec.arrays()
    with jax.default_matmul_precision("highest"):
        wanted = prefill_attention(**arrays, **spec.options, implementation="reference")
    found = prefill_attention(**arrays, **spec.options, implementation=implementation, **named)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        finite = np.isfinite(theirs)
        np.testing.assert_array_equal(ours[~finite], theirs[~finite])
        scale = np.abs(theirs[finite]).max(initial=0.0)
        np.testing.assert_allclose(ours[finite], theirs[finite], atol=spec.tolerance * scale, rtol=0)
