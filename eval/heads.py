"""The per-head report: which KV heads retrieve, which could stream, where the sinks are.

python -m kvx.eval.heads --help
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from kvx.errors import BadInput
from kvx.parts.retrieval_heads import RetrievalHeads

if TYPE_CHECKING:
    from rich.table import Table

    from kvx.decoder import Decoder

RULES = ("repeats", "text")

SHORT = 64
"""Tokens at which the sink rate that papers quote is measured."""

LARGEST = 50_000_000
"""Bytes of a report that are read at most."""

Numbers = tuple[tuple[float, ...], ...]
"""By layer, a number for each head."""


@dataclass(frozen=True)
class HeadReport:
    """Every head of a model, and the KV heads that keep everything.

    Attributes:
        model: as it was named.
        by: how `heads` were chosen: "repeats" or "text" (`head_report`).
        settings: what was run: shares, block, sinks, recent, documents and their length, seed.
        heads: (layer, KV head) pairs, in order: what `razor_attention(heads=...)` takes.
        induction, echo: scores of KV heads on random text that repeats (RazorAttention).
        first: of a query head's attention over real text, the share on the first tokens.
        local: on the first or the newest.
        sinks: what the first token of the texts, cut to at most 64 tokens, is (`kvx.eval.attention_sinks`): "rate" is
            Sink_1(0.3) in percent; by layer the ratios of its norms to the others' ("hidden", "keys", "values",
            "drains"), "peaks", and means over heads of "gaps" and "masses".
    """

    model: str
    by: str
    settings: dict[str, Any]
    heads: tuple[tuple[int, int], ...]
    induction: Numbers
    echo: Numbers
    first: Numbers
    local: Numbers
    sinks: dict[str, Any]

    @property
    def policy(self) -> str:
        """The policy of these heads, as `--policy` takes it."""
        from kvx.policies import razor_attention

        return razor_attention(heads=self.heads).text

    @property
    def reach(self) -> Numbers:
        """By KV head, the share of attention beyond first and newest tokens: of the query head that reaches most."""
        return tuple(
            tuple((1 - np.asarray(local)).reshape(len(scores), -1).max(axis=1).tolist())
            for local, scores in zip(self.local, self.induction, strict=True)
        )

    def as_json(self) -> dict[str, Any]:
        """All of it, with the policy's text."""
        return {**asdict(self), "reach": self.reach, "policy": self.policy}


def head_report(
    name: str,
    model: "Decoder",
    texts: np.ndarray,
    *,
    search: RetrievalHeads,
    by: str = "repeats",
    share: float = 0.15,
    sinks: int = 4,
    recent: int = 64,
    seed: int = 0,
) -> HeadReport:
    """Measure every head, and choose those that keep everything.

    Args:
        name: what the report calls the model.
        texts: (B, T) token ids of real text.
        search: how induction and echo heads are looked for and chosen.
        by: "repeats": by `search`, as RazorAttention does; "text": the KV heads that reach furthest, that is, whose
            attention over the texts goes most beyond first and newest tokens.
        share: of the KV heads to choose, for "text"; rounded up.
        sinks, recent: first and newest tokens of a streaming head.
        seed: of the random text.

    Raises:
        BadInput: another `by`, or what `retrieval_scores`, `streaming_shares` and `attention_sinks` refuse.
    """
    import jax.numpy as jnp

    from kvx.eval.head_scores import retrieval_scores, streaming_shares

    check_rule(by)
    first, local = (_numbers(found) for found in streaming_shares(model, texts, sinks, recent))
    scores = retrieval_scores(model, search, seed)
    induction, echo = (_numbers([np.asarray(layer[row]) for layer in scores]) for row in (0, 1))
    settings = {
        **{key: getattr(search, key) for key in ("induction", "echo", "block", "repeats", "bos")},
        **{"share": share, "sinks": sinks, "recent": recent, "seed": seed},
        **{"documents": len(texts), "tokens": texts.shape[1]},
    }
    sinks_found = _sinks(model, texts)
    report = HeadReport(name, by, settings, search.choose(scores), induction, echo, first, local, sinks_found)
    if by == "repeats":
        return report
    # The same rule, with one score to rank by.
    reach = [jnp.asarray([layer, layer]) for layer in report.reach]
    return replace(report, heads=RetrievalHeads(share, 0.0).choose(reach))


def check_rule(by: str) -> None:
    """Refuse what heads cannot be chosen by.

    Raises:
        BadInput: with the rules.
    """
    if by not in RULES:
        raise BadInput(f"by={by!r} is not offered; allowed: {', '.join(map(repr, RULES))}")


def _sinks(model: "Decoder", texts: np.ndarray) -> dict[str, Any]:
    """What the first token is to attention."""
    from kvx.eval.attention_sinks import attention_sinks

    found = attention_sinks(model, texts[:, :SHORT])
    by_layer = {name: [float(each) for each in ratios] for name, ratios in found.against_the_rest().items()}
    means = {name: [float(np.mean(layer)) for layer in getattr(found, name)] for name in ("gaps", "masses")}
    return {"rate": found.rate(), "tokens": found.hidden.shape[-1], **by_layer, "peaks": found.peaks.tolist(), **means}


def read_heads(path: Path) -> tuple[tuple[int, int], ...]:
    """The (layer, KV head) pairs of a report, or of any JSON object with such "heads"; `razor_attention` takes them.

    Raises:
        BadInput: a file that cannot be read, is too large, or has no such pairs.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise BadInput(f"{str(path)!r} has {path.stat().st_size} bytes; allowed: at most {LARGEST}")
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise BadInput(f"{str(path)!r} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{str(path)!r} is no JSON: {error}") from None
    heads = content.get("heads") if isinstance(content, dict) else None
    if not isinstance(heads, list) or not all(map(_is_pair, heads)):
        raise BadInput(f'{str(path)!r} has no "heads"; allowed: a list of [layer, KV head] pairs')
    return tuple(sorted({(layer, head) for layer, head in heads}))


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and all(type(each) is int and each >= 0 for each in pair)


def _numbers(layers: list[np.ndarray]) -> Numbers:
    return tuple(tuple(float(each) for each in layer) for layer in layers)


def table(report: HeadReport) -> "Table":
    """A row for each layer: its best scores, and how its attention splits, means over query heads."""
    from rich.table import Table

    shown = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("layer", "keeps all", "induction", "echo", "reach", "on first", "on first or newest"):
        shown.add_column(column, justify="right", no_wrap=True)
    for layer, (induction, echo, reach, first, local) in enumerate(
        zip(report.induction, report.echo, report.reach, report.first, report.local, strict=True)
    ):
        chosen = [str(head) for where, head in report.heads if where == layer]
        best = (f"{max(scores):.3f}" for scores in (induction, echo, reach))
        shown.add_row(str(layer), " ".join(chosen), *best, f"{np.mean(first):.1%}", f"{np.mean(local):.1%}")
    return shown


def command(
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
    tokens: Annotated[int, typer.Option(help="Tokens of each.", min=SHORT)] = 1024,
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

        python -m kvx.eval.heads --out heads.json --png heads.png

        kvx generate smollm2-135m-instruct "Once" --policy "$(jq -r .policy heads.json)"

        python -m kvx.eval.heads ./my-model --by text --share 0.25 --text ./my-notes --json
    """
    from rich.console import Console

    import kvx
    from kvx.compilation_cache import enable_compilation_cache
    from kvx.prose import documents, prose

    check_rule(by)
    for path in (out, png):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise BadInput(f"{str(path)!r} cannot be written; allowed: a file in a folder that is there")
    search = RetrievalHeads(induction, echo, block)
    source = prose(text)
    enable_compilation_cache()
    decoder, tokenizer = kvx.load(model)
    texts = documents(tokenizer, source.haystack, count, tokens)
    report = head_report(
        model, decoder, texts, search=search, by=by, share=share, sinks=sinks, recent=recent, seed=seed
    )
    if png is not None:
        from kvx.eval.head_map import head_map_png

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


if __name__ == "__main__":
    from kvx.cli import run

    app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False)
    app.command()(command)
    run(app, "python -m kvx.eval.heads")
