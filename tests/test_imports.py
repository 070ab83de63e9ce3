"""Imports point one way, the spine knows no method by name, and nothing lives in a file whose name says nothing."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = {"kernels": 0, "kvx": 1, "models": 2, "train": 3, "eval": 3}
# `kvx.load` and `kvx.save`, and the command line, reach up from inside functions.
EXCEPTIONS = ("kvx/__init__.py", "kvx/cli/")


def sources() -> list[Path]:
    return sorted(path for folder in LAYERS for path in (ROOT / folder).rglob("*.py"))


def imports(path: Path) -> list[tuple[str, bool]]:
    """(module, at top level) of every import of kvx in a file."""
    tree = ast.parse(path.read_text())
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] if node.module != "kvx" else [f"kvx.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found += [(name, node in tree.body) for name in names if name.split(".")[0] == "kvx"]
    return found


def folder(module: str) -> str:
    """The top-level folder that an import path lives in."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in LAYERS else "kvx"


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    here = str(path.relative_to(ROOT))
    level = LAYERS[here.split("/")[0]]
    for module, top in imports(path):
        if LAYERS[folder(module)] > level:
            assert here.startswith(EXCEPTIONS) and not top, f"{here} imports {module}, which lies above it"


def test_the_spine_names_no_method():
    """No branch on a policy's name or type in the layer loop, prefill, generation, stores, or models."""
    methods = {path.stem for path in (ROOT / "kvx/policies").glob("*.py")} - {"__init__", "registry", "full"}
    spine = [*(ROOT / "kvx").glob("*.py"), *(ROOT / "kvx/stores").glob("*.py"), *(ROOT / "models").rglob("*.py")]
    for path in spine:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            assert not (isinstance(node, ast.Name) and node.id in methods), f"{path.name} names {node.id}"
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("kvx.policies."):
                assert node.module == "kvx.policies.registry", f"{path.name} imports {node.module}"


def test_files_have_names_that_say_something_and_a_first_line_that_says_what_they_hold():
    for path in sources():
        assert path.stem not in {"utils", "util", "helpers", "helper", "common", "misc"}, path
        text = path.read_text()
        if text.strip():
            assert text.startswith('"""') and len(text.split("\n")[0]) > 20, f"{path} does not say what it holds"
