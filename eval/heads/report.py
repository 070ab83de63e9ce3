"""The per-head report: which KV heads retrieve, which could stream, where the sinks are (`kvx heads`)."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

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
        sinks: what the first token of the texts, cut to at most 64 tokens, is (`kvx.eval.heads.sinks`): "rate" is
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

    from kvx.eval.heads.scores import retrieval_scores, streaming_shares

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
    from kvx.eval.heads.sinks import attention_sinks

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
