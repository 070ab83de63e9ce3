"""What made some results: the command as it was typed, whatever started it."""

import json
import subprocess
import sys
from importlib.machinery import ModuleSpec

import pytest

from kvx.eval.provenance import provenance

PROGRAM = "import json; from kvx.eval.provenance import provenance; print(json.dumps(provenance()))"


@pytest.mark.parametrize(
    ("module", "argv", "command"),
    [
        (None, ["/usr/bin/kvx", "compare", "a b"], "kvx compare 'a b'"),
        (
            "kvx.eval.bench_peers.__main__",
            ["/somewhere/__main__.py", "--json"],
            "python -m kvx.eval.bench_peers --json",
        ),
        (None, [""], "python"),
    ],
)
def test_the_command_is_named_as_it_was_typed(monkeypatch, module, argv, command):
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", module and ModuleSpec(module, None))
    monkeypatch.setattr(sys, "argv", argv)
    assert provenance()["command"] == command


def test_versions_and_device_are_those_of_the_process():
    done = subprocess.run([sys.executable, "-c", PROGRAM, "more"], capture_output=True, text=True, check=True)
    made = json.loads(done.stdout)
    assert made["command"] == "-c more"
    assert {"kvx", "jax", "python"} <= set(made["versions"]) and made["device"]["platform"] == "cpu"
