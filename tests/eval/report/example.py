"""A results folder as an evaluation leaves it, made up by seeded formulas: a fixture for reports, no measurement."""

import hashlib
import json
from pathlib import Path

import numpy as np

from kvx.eval.records import COSTS, KEPT, RECORDS, Cell, Cost, Kept, Record, append
from kvx.eval.report import Study

MODEL = "made-up-135m"
TASKS = ("passkey", "key_value(digits=32)", "fidelity")
LENGTHS = (2048, 4096)
MODES = ("agnostic", "aware")
LAYERS, HEADS, HEAD_DIM = 30, 3, 64
BUDGETS = (0.5, 0.25, 0.125)
# How good a selection is, from chance to perfect.
SKILL = {
    "snapkv": 0.85, "adakv": 0.9, "pyramidkv": 0.8, "cake": 0.88, "h2o": 0.5, "tova": 0.55, "streaming_llm": 0.1,
    "knorm": 0.6, "d2o": 0.58, "roco": 0.52, "pyramidinfer": 0.62,
}  # fmt: skip
BITS = {2: (0.17, 0.7), 4: (0.3, 0.97), 8: (0.55, 1.0)}


def policies() -> dict[str, tuple[float, float, float]]:
    """Stored and read shares of a bfloat16 full cache, and chance of keeping what matters; by a policy's text."""
    found = {"full": (2.0, 2.0, 1.0)}
    for name, skill in SKILL.items():
        for budget in BUDGETS:
            found[f"{name}(budget={budget})"] = (2 * budget, 2 * budget, budget + (1 - budget) * skill * budget**0.35)
    for bits, (share, chance) in BITS.items():
        found[f"kivi(bits={bits})"] = (share, share, chance)
        found[f"snapkv(budget=0.5)+kivi(bits={bits})"] = (share / 2, share / 2, 0.8 * chance)
    for budget in (64, 256, 512):
        found[f"quest(budget={budget})"] = (2.1, 2.1 * budget / 2048 + 0.05, 0.9 + budget / 5120)
    return found


def study(samples: int = 20, tokens: int = 256, layers: int = LAYERS) -> Study:
    """All parts; `tokens` and `layers` are those of what was kept."""
    return Study(config(), records(samples), kept(tokens, layers), costs())


def config() -> dict:
    """As a job writes it."""
    return {
        "name": "Made-up example",
        "seed": 0,
        "command": "kvx eval configs/eval/example.toml --out results/example",
        "commit": "0000000",
        "versions": {"python": "3.11", "jax": "0.10.2"},
        "device": {"platform": "cpu", "kind": "cpu", "count": 2},
        "models": [{"name": MODEL, "dtype": "float32"}],
        "tasks": [{"name": task, "samples": 20} for task in TASKS],
        "lengths": list(LENGTHS),
        "policies": list(policies()),
    }


def records(samples: int) -> list[Record]:
    """Every policy, task, length and mode."""
    found = []
    for task in TASKS:
        for length in LENGTHS:
            for mode in MODES if task != "fidelity" else MODES[:1]:
                cell = Cell(MODEL, task, length, mode)
                for policy, numbers in policies().items():
                    found += [_record(cell, policy, *numbers, index, samples) for index in range(samples)]
    return found


def _record(cell: Cell, policy: str, stored: float, read: float, chance: float, index: int, samples: int) -> Record:
    random = _random(cell, policy, index)
    depth = None if cell.task == "fidelity" else (index + 0.5) / samples
    hard = 1.0 + (cell.length > 2048) + (cell.task != "passkey")
    if policy.startswith("streaming_llm"):
        chance = float(depth is not None and depth > 1 - stored / 2)
    known = chance ** (hard * (0.5 if cell.mode == "aware" else 1.0))
    bf16 = cell.length * LAYERS * HEADS * HEAD_DIM * 4
    measures = {}
    if cell.task == "fidelity":
        score = 0.0 if policy == "full" else float(np.exp(random.normal(-6 + 9 * (1 - known), 0.3)))
        measures = {"agreement": float(np.exp(-score)), "perplexity": 12.0 + score}
    else:
        score = float(random.random() < 0.03 + 0.95 * known)
    return Record(
        cell, policy, index, hashlib.sha256(f"{cell}{index}".encode()).hexdigest(), cell.length - index % 7, depth,
        ("12345",), (("12345",),), (score,), int(stored * bf16), bf16, int(read * bf16),
        retention=None if depth is None else min(1.0, known), measures=measures,
        seconds={"prefill": 2.0, "decode": 0.5},
    )  # fmt: skip


def kept(tokens: int, layers: int) -> list[Kept]:
    """What policies kept of the first prompt of each cell of the shorter length; the full cache everything."""
    words = (
        "the",
        " pass",
        " key",
        " is",
        " 48213",
        ".",
        "\n",
        " of",
        " a",
        " distant",
        " shore",
        " light",
        " and",
        " Zoë",
    )
    found = []
    for task in TASKS:
        cell = Cell(MODEL, task, LENGTHS[0], MODES[0])
        text = tuple(words[place] for place in _random(cell, "text", 0).integers(len(words), size=tokens))
        importance = _random(cell, "importance", 0).gumbel(size=(layers, HEADS, tokens))
        importance += 3 * np.exp(-np.arange(tokens) / 4) + 4 * (np.arange(tokens) > tokens - 24)
        importance[:, :, tokens // 3 : tokens // 3 + 9] += 2.5
        for policy, (stored, _, _) in policies().items():
            if "kivi" in policy and "snapkv" not in policy:
                continue
            share = min(1.0, stored / 2)
            # Pyramids keep less in higher layers; heads of adakv share a layer's budget.
            slope = np.linspace(1.6, 0.4, layers) if policy.startswith(("pyramid", "cake")) else np.ones(layers)
            tilt = _random(cell, policy, 0).uniform(0.4, 1.6, (layers, HEADS)) if policy.startswith("adakv") else 1.0
            wanted = np.clip(share * slope[:, None] * tilt, 2 / tokens, 1.0) * np.ones((layers, HEADS))
            order = np.argsort(np.argsort(-importance, axis=-1), axis=-1)
            if policy.startswith("streaming_llm"):
                place = np.arange(tokens)
                order = np.broadcast_to(np.where(place < 4, place, tokens - place + 3), order.shape)
            mask = order < np.rint(wanted[:, :, None] * tokens)
            counts = tuple(tuple(int(count) for count in row) for row in mask.sum(axis=-1))
            found.append(Kept(cell, policy, text, counts, Kept.packed(mask), mask.shape))
    return found


def costs() -> list[Cost]:
    """Over lengths at batch 1, and over batches at the shorter length."""
    found = []
    for length, batch in [(512, 1), (1024, 1), (2048, 1), (4096, 1), (8192, 1), (2048, 2), (2048, 4), (2048, 8)]:
        bf16 = batch * length * LAYERS * HEADS * HEAD_DIM * 4
        for policy, (stored, read, chance) in policies().items():
            extra = 1.0 + 0.3 * (1 - chance) + 0.1 * ("kivi" in policy)
            found.append(
                Cost(
                    MODEL, policy, length, batch, int(stored * bf16), int(0.02 * stored * bf16),
                    int(3e8 + 2 * bf16 + 40 * batch * length**1.5), int(read * bf16),
                    1e-4 * batch * length**1.3 * extra, 0.012 + 2e-9 * read * bf16 * extra,
                )
            )  # fmt: skip
    return found


def write(folder: Path, made: Study) -> Path:
    """A study as files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(made.config))
    for name, lines in ((RECORDS, made.records), (KEPT, made.kept), (COSTS, made.costs)):
        if lines:
            append(folder / name, lines)
    return folder


def _random(cell: Cell, policy: str, index: int) -> np.random.Generator:
    digest = hashlib.sha256(repr((cell, policy, index)).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))
