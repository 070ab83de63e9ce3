"""Claims about which implementation runs: a named one or none other, else the best that takes the arguments."""

import pytest

from kvx.kernels.implementations import PREFERENCE, choose, compiling_for, target_platform

OFFERED = {name: (lambda name=name: name) for name in ("reference", "xla", "mosaic_tpu", "triton")}


def refuses(*names):
    return lambda name: "dim is 60" if name in names else None


@pytest.mark.parametrize(("platform", "best"), [("tpu", "mosaic_tpu"), ("gpu", "triton"), ("cpu", "xla")])
def test_without_a_name_the_platform_compiled_for_decides(platform, best):
    with compiling_for(platform):
        assert target_platform() == platform
        assert choose("attention", None, OFFERED)() == best
        # What is best cannot take the arguments: the next one runs.
        assert choose("attention", None, OFFERED, refuses(best))() == PREFERENCE[platform][1]


def test_a_named_one_never_falls_back():
    assert choose("attention", "triton", OFFERED)() == "triton"
    with pytest.raises(ValueError, match="implementation='triton' of attention cannot run: dim is 60"):
        choose("attention", "triton", OFFERED, refuses("triton"))
    with pytest.raises(ValueError, match="'cuda', attention has reference, xla"):
        choose("attention", "cuda", OFFERED)


def test_the_platform_is_as_before_afterwards():
    before = target_platform()
    with pytest.raises(ValueError, match="'rocm', allowed are tpu, gpu, cpu"), compiling_for("rocm"):
        pass
    with pytest.raises(KeyError), compiling_for("tpu"):
        raise KeyError
    assert target_platform() == before
