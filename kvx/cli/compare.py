"""`kvx compare`: the main job: many policies, two workloads, one table, one picture."""

from pathlib import Path
from typing import Annotated

import typer

from kvx.cli.policy_argument import HELP, policy_argument


def compare(
    model: Annotated[str, typer.Argument(help="A zoo name, a Hugging Face directory, or a .gguf file.")] = (
        "smollm2-135m-instruct"
    ),
    policy: Annotated[
        list[str] | None, typer.Option("--policy", "-p", help=HELP + " May be repeated; default: a list of all kinds.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="The long grid: more prompts, depths and lengths.")] = False,
    text: Annotated[
        Path | None, typer.Option(help="A folder of .txt or .md files to use instead of Python's documentation.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where results.json, frontier.png and report.html go.")] = Path(
        "results/compare"
    ),
    seed: Annotated[int, typer.Option(help="Seed of keys, depths and texts.", min=0)] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print the results as JSON instead of a table.")] = False,
    timings: Annotated[bool, typer.Option("--timings", help="Also say where the time went.")] = False,
) -> None:
    """Compare cache policies: quality against bytes, on passkey retrieval and on perplexity through the decode path.

    The full cache is always among them, as the reference.

    Examples:

        kvx compare

        kvx compare --policy "snapkv(budget=256)" --policy "kivi(bits=2)" --out results/two

        kvx compare ./my-model --text ./my-notes --json > results.json
    """
    from kvx.compilation_cache import enable_compilation_cache
    from kvx.eval.compare import Workload, checked_out, compare_policies, default_policies
    from kvx.eval.comparison import print_results
    from kvx.prose import prose

    chosen = [policy_argument(each) for each in policy] if policy else default_policies()
    source = prose(text)
    folder = checked_out(out)
    enable_compilation_cache()
    workload = Workload.long() if full else Workload()
    results = compare_policies(model, chosen, source, workload, seed=seed, out=folder)
    results.write(folder)
    print_results(results, as_json=json, timings=timings)
