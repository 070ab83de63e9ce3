"""`kvx heads`: which KV heads retrieve, which could stream, and where attention sinks are."""

import json
from pathlib import Path
from typing import Annotated

import typer


def heads(
    model: Annotated[str, typer.Argument(help="A zoo name, a Hugging Face directory, or a .gguf file.")] = (
        "smollm2-135m-instruct"
    ),
    by: Annotated[
        str, typer.Option(help="repeats: induction and echo heads (RazorAttention); text: heads that reach furthest.")
    ] = "repeats",
    induction: Annotated[float, typer.Option(help="Share of KV heads chosen by induction.", min=0, max=1)] = 0.14,
    echo: Annotated[float, typer.Option(help="Share chosen by echo.", min=0, max=1)] = 0.01,
    share: Annotated[float, typer.Option(help="Share chosen by reach, with --by text.", min=0, max=1)] = 0.15,
    block: Annotated[int, typer.Option(help="Random tokens, repeated four times; the paper's are 2500.", min=2)] = 512,
    sinks: Annotated[int, typer.Option(help="First tokens of a streaming head.", min=0)] = 4,
    recent: Annotated[int, typer.Option(help="Newest tokens of a streaming head.", min=1)] = 64,
    count: Annotated[int, typer.Option("--documents", help="Documents of real text.", min=1)] = 4,
    tokens: Annotated[int, typer.Option(help="Tokens of each.", min=64)] = 1024,
    text: Annotated[
        Path | None, typer.Option(help="A folder of .txt or .md files. Default: Python's documentation, first half.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the random text.", min=0)] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the report here, as JSON.")] = None,
    png: Annotated[Path | None, typer.Option(help="Write a map of layers and heads here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Which heads retrieve, which could do with sinks and neighbours, and where attention sinks are.

    The JSON names the heads that should keep everything, and a policy that keeps them.

    Examples:

        kvx heads smollm2-135m-instruct --out heads.json --png heads.png

        kvx generate smollm2-135m-instruct "Once" --policy "$(jq -r .policy heads.json)"

        kvx heads ./my-model --by text --share 0.25 --text ./my-notes --json
    """
    from rich.console import Console

    import kvx
    from kvx.compilation_cache import enable_compilation_cache
    from kvx.destinations import check_file
    from kvx.eval.heads.report import check_rule, head_report, table
    from kvx.parts.retrieval_heads import RetrievalHeads
    from kvx.prose import documents, prose

    check_rule(by)
    for name, path in (("out", out), ("png", png)):
        if path is not None:
            check_file(path, name)
    search = RetrievalHeads(induction, echo, block)
    source = prose(text)
    enable_compilation_cache()
    decoder, tokenizer = kvx.load(model)
    texts = documents(tokenizer, source.haystack, count, tokens)
    report = head_report(
        model, decoder, texts, search=search, by=by, share=share, sinks=sinks, recent=recent, seed=seed
    )
    if png is not None:
        from kvx.eval.heads.picture import head_map_png

        png.write_bytes(head_map_png(report))
    if out is not None:
        out.write_text(json.dumps(report.as_json(), indent=2) + "\n", encoding="utf-8")
    if as_json:
        print(json.dumps(report.as_json(), indent=2))
        return
    console = Console()
    console.print(table(report))
    console.print(f"\n{len(report.heads)} heads keep everything, chosen by {by}:", highlight=False)
    console.print(report.policy, highlight=False, soft_wrap=True)
    sunk = f"{report.sinks['rate']:.1f} % of heads give the first of {report.sinks['tokens']} tokens more than 0.3"
    console.print(f"{sunk} of their attention (Sink_1)", highlight=False)
