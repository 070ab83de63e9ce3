"""Claims about the command line: help with examples, JSON, and bad input as one line with exit status 2."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import kvx
from kvx.cli import app, main
from kvx.policies import names

COMMANDS = ("fetch", "generate", "compare", "eval", "policies", "plan", "search", "heads", "distill")


def run(capsys, *arguments):
    """Exit status, standard output and standard error of a command line."""
    with pytest.raises(SystemExit) as end:
        main(arguments)
    shown = capsys.readouterr()
    return end.value.code, shown.out, shown.err


def test_help_names_every_command_and_every_command_has_examples():
    runner = CliRunner()
    shown = runner.invoke(app, ["--help"])
    assert shown.exit_code == 0 and all(name in shown.output for name in COMMANDS)
    for name in COMMANDS:
        shown = runner.invoke(app, [name, "--help"])
        assert shown.exit_code == 0 and "Examples" in shown.output and f"kvx {name}" in shown.output


def test_policies_lists_every_name_and_explains_one(capsys):
    status, out, _ = run(capsys, "policies")
    assert status == 0 and all(name in out for name in names())
    status, out, _ = run(capsys, "policies", "snapkv")
    assert status == 0 and out.startswith("snapkv(budget, window=64") and "a_j = pool_j" in out and "Args:" in out


def test_policies_as_json(capsys):
    _, out, _ = run(capsys, "policies", "--json")
    assert [each["name"] for each in json.loads(out)] == list(names())
    _, out, _ = run(capsys, "policies", "quest", "--json")
    assert {"name": "page", "required": False, "default": "16", "type": "int"} in json.loads(out)["parameters"]


EVALUATION = str(Path(__file__).parents[3] / "configs" / "eval" / "smollm2_135m.toml")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("policies", "snapkw"), "did you mean 'snapkv'"),
        (("generate", "smollm2-135m-instruc", "Hi"), "did you mean 'smollm2-135m-instruct'"),
        (("generate", "smollm2-135m-instruct", "Hi", "--policy", "snapkv(budget=0)"), "budget=0 is not positive"),
        (("generate", "smollm2-135m-instruct", "Hi", "--policy", "snapkv(budget=nan)"), "budget=nan is out of range"),
        (("generate", "smollm2-135m-instruct", "Hi", "--policy", "kivi(bits=5)"), "bits=5"),
        (("generate", "smollm2-135m-instruct", "Hi", "--policy", "snapkv(budget=256"), "column 18"),
        (("generate", "smollm2-135m-instruct", "Hi", "--policy", "nothing.safetensors"), "cannot be read"),
        (("generate", "smollm2-135m-instruct", "Hi", "--max-new-tokens", "0"), "max_new_tokens=0"),
        (("generate", "smollm2-135m-instruct", "Hi", "--temperature", "-1"), "temperature=-1.0"),
        (("generate", "smollm2-135m-instruct", "Hi", "--top-p", "1.5"), "top_p=1.5"),
        (("generate", "smollm2-135m-instruct", ""), "prompt is empty"),
        (("generate", "smollm2-135m-instruct", "Hi", "--max-new-tokens", "many"), "--max-new-tokens"),
        (("generate", "smollm2-135m-instruct"), "rompt"),
        (("compare", "--policy", "snapkv(budgett=3)"), "did you mean 'budget'"),
        (("compare", "--text", "/nowhere/at/all"), "is not a folder"),
        (("compare", "--nothing"), "--nothing"),
        (("generate", "smollm2-135m-instruct", "Hi", "--policy", "snapkv(256" + " " * 300), "column"),
        (("bench", "kernels", "--implementation", "cuda"), "unknown implementation 'cuda'"),
        (("bench", "kernels", "--out", "/proc/here/table.md"), "/proc/here' cannot be made"),
        (("heads", "smollm2-135m-instruct", "--png", "/nowhere/at/all.png"), "lies in no folder"),
        (
            ("eval", EVALUATION, "--set", "tasks.0.name=paskey"),
            "tasks.0: unknown task 'paskey': did you mean",
        ),
        (("fetch", "smollm2"), "known: gemma3-270m, smollm2-135m-instruct"),
        (("fetsch",), "fetsch"),
    ],
)
def test_bad_input_is_one_line_and_status_2(capsys, arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, *arguments)
    assert status == 2 and out == "" and words in err
    assert len(err.strip().splitlines()) == 1 and err.startswith("kvx: error: ")
    assert list(tmp_path.iterdir()) == []  # nothing written


def test_an_out_folder_that_cannot_be_is_refused_before_any_work(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    status, _, err = run(capsys, "compare", "--out", str(tmp_path / "file"))
    assert status == 2 and "cannot be written" in err


def test_an_extra_that_is_not_installed_is_one_line_too(capsys, monkeypatch):
    def missing():
        raise ModuleNotFoundError("No module named 'grain.python'", name="grain.python")

    monkeypatch.setattr("kvx.policies.names", missing)
    status, out, err = run(capsys, "policies")
    assert status == 2 and out == "" and err == "kvx: error: grain is not installed; allowed: pip install kvx[train]\n"


def test_programs_of_modules_say_what_is_missing_and_know_short_help(capsys):
    """Alone they were silent."""
    import kvx.cli
    from kvx.train.curves import app

    for arguments, words in (((), "rror: Missing"), (("-h",), "kvx.train.curves")):
        with pytest.raises(SystemExit):
            kvx.cli.run(app, "python -m kvx.train.curves", arguments)
        shown = capsys.readouterr()
        assert words in shown.out + shown.err


def test_a_bug_keeps_its_traceback(monkeypatch):
    def broken():
        raise RuntimeError("a bug")

    monkeypatch.setattr("kvx.policies.names", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["policies"])


def test_the_installed_program_runs():
    done = subprocess.run(
        [sys.executable, "-c", "from kvx.cli import main; main()", "policies", "nope"], capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("kvx: error: unknown policy 'nope'") and done.stderr.count("\n") == 1


def test_the_zoo_is_listed(capsys):
    status, out, _ = run(capsys, "fetch", "--list", "--json")
    assert status == 0 and "smollm2-135m-instruct" in {row["model"] for row in json.loads(out)}


def test_the_compilation_cache_is_the_callers_choice(tmp_path, monkeypatch):
    import jax

    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=1")
    try:
        assert kvx.enable_compilation_cache(tmp_path / "programs") == tmp_path / "programs"
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "programs")
        (tmp_path / "file").write_text("")
        with pytest.raises(kvx.BadInput, match="cannot be made"):
            kvx.enable_compilation_cache(tmp_path / "file")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.parametrize("flags", ["--xla_force_host_platform_device_count=8", "--xla_dump_to=x", None])
def test_cpus_that_stand_for_several_devices_keep_no_programs(tmp_path, monkeypatch, flags):
    """Read back, their collectives run in any order, and devices wait for each other."""
    import jax

    before, used = jax.config.jax_compilation_cache_dir, jax.config.jax_enable_compilation_cache
    monkeypatch.delenv("XLA_FLAGS") if flags is None else monkeypatch.setenv("XLA_FLAGS", flags)
    several = flags is not None and "device_count" in flags
    jax.config.update("jax_enable_compilation_cache", True)
    try:
        assert kvx.enable_compilation_cache(tmp_path) == tmp_path
        assert jax.config.jax_enable_compilation_cache == (not several)
        assert jax.config.jax_compilation_cache_dir == (before if several else str(tmp_path))
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        jax.config.update("jax_enable_compilation_cache", used)
