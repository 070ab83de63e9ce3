"""A wheel built from the repository works outside it, and puts nothing but `kvx` into site-packages."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_wheel_works_outside_the_repository(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("kvx-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"kvx"}
    sources = {
        path.relative_to(ROOT).as_posix()
        for folder in ("kvx", "models", "kernels", "train", "eval")
        for path in (ROOT / folder).rglob("*.py")
    }
    packed = {name for name in names if name.endswith(".py")}
    assert packed == {source if source.startswith("kvx/") else f"kvx/{source}" for source in sources}

    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True)
    script = (
        "import kvx, kvx.models.build, kvx.eval.compare, kvx.cli, kvx.kernels.prefill_attention;"
        "print(kvx.__file__); print(kvx.policies.snapkv(budget=256).text)"
    )
    # -P and -S keep the editable install and the repository out; its dependencies come from this environment.
    paths = ":".join([str(site), *(path for path in sys.path if path.endswith("site-packages"))])
    run = subprocess.run(
        [sys.executable, "-P", "-S", "-c", script],
        cwd=tmp_path,
        env={"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    where, text = run.stdout.split("\n")[:2]
    assert where.startswith(str(site)) and text == "snapkv(budget=256)"
