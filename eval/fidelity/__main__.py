"""The command python -m kvx.eval.fidelity: policies beside the full cache, in a table or as JSON."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from kvx.eval.fidelity.findings import Fidelity


def table(found: Sequence["Fidelity"]) -> "Table":
    """A row for each policy; the last column is paired with the first policy."""
    import numpy as np
    from rich.table import Table

    shown = Table(box=None, pad_edge=False, header_style="bold")
    shown.add_column("policy", no_wrap=True)
    for column in (
        "KL from full, nats (95 %)",
        "top-1",
        "perplexity",
        "recall",
        "error",
        "cache KiB",
        "maps KiB",
        "less than the first (paired)",
    ):
        shown.add_column(column, justify="right", no_wrap=True)
    for each in found:
        shown.add_row(
            each.policy,
            str(each.kl),
            f"{np.mean(each.agreement):.1%}",
            f"{np.exp(np.mean(each.surprisals)):.2f}",
            f"{np.mean(each.recall):.1%}",
            f"{np.mean(each.attention_error):.3f}",
            f"{each.cache_bytes / 1024:.1f}",
            f"{each.policy_bytes / 1024:.1f}",
            "" if each is found[0] else str(each.less_than(found[0])),
        )
    return shown


def command(
    policy: Annotated[list[str], typer.Option("--policy", "-p", help="A policy's text, or a file of kvx.save_policy.")],
    model: Annotated[str, typer.Option(help="A zoo name, a Hugging Face directory, or a .gguf file.")] = (
        "smollm2-135m-instruct"
    ),
    count: Annotated[int, typer.Option("--documents", help="Held-out documents.", min=1)] = 8,
    prompt: Annotated[int, typer.Option(help="Tokens of each that are prefilled.", min=1)] = 256,
    forced: Annotated[int, typer.Option(help="Tokens of each that are forced through the decode path.", min=2)] = 256,
    most: Annotated[int, typer.Option(help="k of the recall of the k most attended tokens.", min=1)] = 32,
    bins: Annotated[int, typer.Option(help="Stretches of the text in the JSON.", min=1)] = 8,
    text: Annotated[
        Path | None, typer.Option(help="A folder of .txt or .md files. Default: Python's documentation, second half.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: also by layer, head and position.")] = False,
) -> None:
    """How far policies lie from the full cache, without any task, over forced decode steps along documents.

    Mean KL(full || policy) of next-token distributions, agreement of the likeliest token, perplexity; the share of the
    full cache's most attended tokens that a policy still holds and reads (recall); and the relative L2 error of a
    layer's attention output, for the same query (error). KL comes with its interval over documents.

    Examples:

        python -m kvx.eval.fidelity -p "h2o(budget=64)" -p "h2o(budget=68)" -p less.safetensors

        python -m kvx.eval.fidelity -p "snapkv(budget=128)" --documents 16 --bins 16 --json > fidelity.json
    """
    from rich.console import Console

    import kvx
    from kvx.cli.policy_argument import policy_argument
    from kvx.compilation_cache import enable_compilation_cache
    from kvx.eval.fidelity.measure import fidelity
    from kvx.prose import documents, prose

    chosen = [policy_argument(each) for each in policy]
    source = prose(text)
    enable_compilation_cache()
    decoder, tokenizer = kvx.load(model)
    texts = documents(tokenizer, source.held_out, count, prompt + forced)
    found = fidelity(decoder, texts, prompt, chosen, most=most)
    if as_json:
        print(json.dumps([each.as_json(bins) for each in found], indent=2))
        return
    Console(width=None if Console().is_terminal else 170).print(table(found))


if __name__ == "__main__":
    from kvx.cli import program, run

    run(program(command), "python -m kvx.eval.fidelity")
