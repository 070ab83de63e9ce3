"""Test session set-up: CPU with eight simulated devices, and shapes checked at run time in everything we import."""

import os
from pathlib import Path

import platformdirs

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The tests compile far more than they compute: without LLVM's optimisations they take two thirds of the time. XLA's own
# passes (layouts, copies, fusions) are not affected.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0")
# Compiled programs are shared by the workers, by files that need the same ones, and by the next session.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(platformdirs.user_cache_dir("kvx")) / "test-programs"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Only its compiler is used, for chips that are not there: it need not have the machine to itself.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

from jaxtyping import install_import_hook

install_import_hook("kvx", "beartype.beartype")

from collections import Counter
from collections.abc import Iterator

import jax
import pytest
from jax._src import compiler

MAPS = 30_000
"""Memory maps at which a process lets go of its programs: beyond the kernel's limit of 65,530, XLA crashes."""

KEY = compiler._get_cache_key


def key_of_one_device(*arguments, devices, **named):
    """The cache's key of a program; none where it spans devices, see `kvx.compilation_cache`."""
    return KEY(*arguments, devices=devices, **named) if devices.size == 1 else None


compiler._get_cache_key = key_of_one_device
jax.jit(lambda: 0)()  # the first program decides whether a process uses the cache, before a test can


@pytest.hookimpl(tryfirst=True)  # before items are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a `sampled` test's variants, all but the first ones are slow."""
    quick: Counter[str] = Counter()
    for item in items:
        mark = item.get_closest_marker("sampled")
        if mark is None or item.get_closest_marker("slow"):
            continue
        test = item.nodeid.partition("[")[0]
        quick[test] += 1
        if quick[test] > (mark.args[0] if mark.args else 1):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True, scope="module")
def programs_of_one_module_only() -> Iterator[None]:
    """Compiled programs go after each file, so that a long session does not pile them up."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def few_memory_maps() -> Iterator[None]:
    """... and within a file that compiles thousands of them."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MAPS:
        jax.clear_caches()
