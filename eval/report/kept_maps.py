"""What policies kept of a prompt, small enough to mail: shares of (layer, head) by token, of heads by layer and token.

A share is told in 16 steps, two tokens a byte, as base64. The first step means none and the last one all; nothing else
is ever rounded to them.
"""

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from kvx.errors import BadInput
from kvx.eval.records import Kept

STEPS = 16

SHOWN = 4096
"""Tokens of a prompt shown as text, half from its start and half from its end."""

BOXES = 6_000_000
"""Of the images of all policies together (4 MB of the page): many of them are drawn more coarsely than few."""

NARROWEST, WIDEST = 64, 1024
"""Columns of an image of layers by tokens."""


def kept_maps(kept: Sequence[Kept], cells: Sequence[Any], policies: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Tables for the page.

    Args:
        kept: any number of them.
        cells, policies: to name them by their index.

    Returns:
        prompts: each once: its number of tokens, and those shown.
        maps: one for each of `kept`: cell, policy, prompt; layers, heads; counts by layer and head; shares of the
            tokens shown; columns and image: shares by layer and column, row by row.

    Raises:
        BadInput: masks, counts and texts whose sizes disagree.
    """
    columns = max(NARROWEST, min(WIDEST, BOXES // max(1, sum(each.shape[0] for each in kept))))
    prompts: dict[tuple[str, ...], int] = {}
    maps = []
    for each in kept:
        _check(each)
        mask = each.mask
        by_layer = mask.mean(axis=1)
        width = min(columns, len(each.text))
        maps.append(
            {
                "cell": cells.index(each.cell),
                "policy": policies.index(each.policy),
                "prompt": prompts.setdefault(each.text, len(prompts)),
                "layers": each.shape[0],
                "heads": each.shape[1],
                "counts": each.counts,
                "shares": packed(mask.mean(axis=(0, 1))[_shown(each.shape[2])]),
                "columns": width,
                "image": packed(_pooled(by_layer, width).ravel()),
            }
        )
    return {
        "prompts": [{"count": len(text), "tokens": [text[place] for place in _shown(len(text))]} for text in prompts],
        "maps": maps,
    }


def packed(shares: Float[np.ndarray, "N"]) -> str:
    """Shares in [0, 1] as base64 of `STEPS` levels, two a byte, the first in the high bits."""
    last = STEPS - 1
    inner = np.clip(np.rint(shares * last), 1, last - 1)
    levels = np.where(shares <= 0, 0, np.where(shares >= 1, last, inner)).astype(np.uint8)
    pairs = np.append(levels, np.zeros(len(levels) % 2, np.uint8)).reshape(-1, 2)
    return base64.b64encode((pairs[:, 0] << 4 | pairs[:, 1]).tobytes()).decode()


def _shown(count: int) -> Int[np.ndarray, "N"]:
    """Places of the tokens shown: the start and the end of a prompt."""
    places = np.arange(count)
    return places if count <= SHOWN else np.concatenate([places[: SHOWN // 2], places[-SHOWN // 2 :]])


def _pooled(shares: Float[np.ndarray, "L T"], columns: int) -> Float[np.ndarray, "L C"]:
    """Means over runs of tokens of nearly equal length."""
    edges = np.linspace(0, shares.shape[1], columns + 1).astype(int)
    return np.add.reduceat(shares, edges[:-1], axis=1) / np.diff(edges)


def _check(kept: Kept) -> None:
    layers, heads, tokens = kept.shape
    whose = f"what {kept.policy!r} kept on {kept.cell.task!r} at {kept.cell.length} tokens"
    if min(kept.shape) < 1 or len(kept.text) != tokens:
        raise BadInput(f"{whose} has the shape {kept.shape} and {len(kept.text)} tokens of text; allowed: as many")
    if len(kept.counts) != layers or any(len(row) != heads for row in kept.counts):
        raise BadInput(f"{whose} has counts of another shape than {layers} layers of {heads} heads")
    size, needed = len(base64.b64decode(kept.bits)), -(-layers * heads * tokens // 8)
    if size != needed:
        raise BadInput(f"{whose} has a mask of {size} bytes; allowed: {needed}, a bit for each layer, head and token")
