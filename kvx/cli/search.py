"""`kvx search`: policies on the frontier of quality against bytes, under a limit."""

from pathlib import Path
from typing import Annotated, Any

import typer


def search(
    max_bytes_per_token: Annotated[
        float, typer.Option(help="What a cache may take, all layers together, for each token of the prompt.")
    ],
    model: Annotated[str, typer.Option(help="A zoo name, a Hugging Face directory, or a .gguf file.")] = (
        "smollm2-135m-instruct"
    ),
    task: Annotated[str, typer.Option(help="Of `kvx eval --tasks`, or fidelity.")] = "passkey",
    length: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 2048,
    samples: Annotated[int, typer.Option(help="Samples for those that do well on fewer.")] = 64,
    trials: Annotated[int, typer.Option(help="Policies within the limit that are run.")] = 64,
    only: Annotated[list[str] | None, typer.Option(help="A method to search. May be repeated; default: all.")] = None,
    without: Annotated[list[str] | None, typer.Option(help="A method to leave out. May be repeated.")] = None,
    mode: Annotated[str, typer.Option(help="agnostic, aware or turns: whether the question is in the prompt.")] = (
        "agnostic"
    ),
    option: Annotated[
        list[str] | None,
        typer.Option(help="An option of the task, as in TOML: digits=32 of key_value. Repeatable."),
    ] = None,
    forced: Annotated[int, typer.Option(help="For fidelity: tokens of a document that are forced.")] = 128,
    batch: Annotated[int, typer.Option(help="Samples at a time.")] = 4,
    chat: Annotated[bool, typer.Option("--chat", help="Write prompts in the model's chat template.")] = False,
    text: Annotated[
        Path | None, typer.Option(help="A folder of .txt or .md files to use instead of Python's documentation.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of samples, calibration and proposals.", min=0)] = 0,
    out: Annotated[Path | None, typer.Option(help="The results folder. Default: results/search/TASK.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print search.json instead of a table.")] = False,
) -> None:
    """Find policies on the frontier: methods, parameters and chains that keep quality in the fewest bytes.

    Proposals are sized before anything is run. Those within the limit are run on a few samples; the better half goes on
    to four times as many. After an interruption the same command goes on where it stopped, and ends the same.

    The folder holds frontier.toml for `kvx eval`, search.json, frontier.png, and a record for every sample.

    Examples:

        kvx search --max-bytes-per-token 8000

        kvx search --max-bytes-per-token 4000 --task key_value --length 1024 --only snapkv --only kivi --only h2o

        kvx search --max-bytes-per-token 8000 --task fidelity --length 512 --samples 16

        kvx eval results/search/passkey/frontier.toml
    """
    from rich.console import Console

    from kvx.compilation_cache import enable_compilation_cache
    from kvx.eval.search.findings import table, told
    from kvx.eval.search.job import SearchJob
    from kvx.eval.search.run import CONFIG, JSON, run_search
    from kvx.section_file import section_from

    given: dict[str, Any] = {
        "max_bytes_per_token": max_bytes_per_token, "model": model, "task": task, "length": length, "samples": samples,
        "trials": trials, "only": only or [], "without": without or [], "mode": mode, "options": _options(option or []),
        "forced": forced, "batch": batch, "chat": chat, "seed": seed,
    }  # fmt: skip
    given |= {name: str(path) for name, path in (("text", text), ("output", out)) if path is not None}
    job = section_from(SearchJob, given)
    enable_compilation_cache()
    found, rows = run_search(job)
    if json:
        print((Path(job.folder) / JSON).read_text(), end="")
        return
    console = Console(width=None if Console().is_terminal else 150)
    console.print(table(found, rows))
    for line in told(found):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(f"kvx eval {Path(job.folder) / CONFIG}", highlight=False, markup=False, soft_wrap=True)


def _options(texts: list[str]) -> dict[str, Any]:
    """Values as TOML writes them; what is none is a text without quotes."""
    import tomllib

    from kvx.errors import BadInput

    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise BadInput(f"option={text!r}; allowed: key=value, such as digits=32")
        try:
            found[key] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            found[key] = value
    return found
