"""Test session set-up: CPU with eight simulated devices, and shapes checked at run time in everything we import."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

from jaxtyping import install_import_hook

install_import_hook("kvx", "beartype.beartype")
