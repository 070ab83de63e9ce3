"""Learning curves of several starts beside one teacher: held-out perplexity and passkeys against tokens, resumable.

    python -m kvx.train.curves OUT --start "transmla(rank=64, rotary=32)" --start ... --train a.npy --held-out b.npy

Every curve is a run of its own in a folder of its own; all see the same rows in the same order. A curve that is over is
read, one that was interrupted goes on. `curves.jsonl`, `curves.csv` and `curves.png` hold all that is there, also along
the way.
"""

import csv
import json
from collections.abc import Iterable, Sequence
from os.path import isdir
from pathlib import Path
from typing import Annotated, Any

import jax.numpy as jnp
import numpy as np
import typer
from rich.console import Console

import kvx
from kvx.cli import program, run
from kvx.destinations import make_folder
from kvx.errors import BadInput
from kvx.models.build import Model, abstract_model
from kvx.train.curve import UNCONVERTED, Bench, Setting, folder_of
from kvx.train.curves_plot import plot
from kvx.train.data.token_file import open_tokens
from kvx.train.interruption import Interruption
from kvx.train.job import MOST_CALIBRATION, RawIds
from kvx.train.mesh import ALONG_ROWS, check_batch, make_placement
from kvx.train.metrics import FILE, read
from kvx.train.recall import passkeys, prompts
from kvx.train.shapes import model_config
from kvx.train.stage import LossSection, StageSection


def collect(out: Path, keys: Iterable[tuple[str, int]], tokens: int) -> list[dict[str, Any]]:
    """Every evaluation that is there, and the files of them.

    Args:
        keys: starts and seeds.
        tokens: of a step.
    """
    found = []
    for start, seed in keys:
        path = folder_of(out, start, seed) / FILE
        lines = read(path) if path.exists() else []
        for line in lines:
            if "held_out" in line:
                facts = {"start": start, "seed": seed, "step": int(line["step"]), "tokens": int(line["step"]) * tokens}
                teacher = line.get("teacher_held_out")
                beside = {} if teacher is None else {"teacher_perplexity": float(np.exp(teacher))}
                beside |= {name: line[name] for name in ("passkey", "teacher_passkey") if name in line}
                found.append({**facts, "held_out": line["held_out"], "perplexity": line["perplexity"], **beside})
    (out / "curves.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))
    if found:
        with open(out / "curves.csv", "w", newline="") as stream:
            writer = csv.DictWriter(stream, list(dict.fromkeys(name for line in found for name in line)))
            writer.writeheader()
            writer.writerows(found)
        plot(found, out / "curves.png")
    return found


def check_starts(starts: Sequence[str], source: Model) -> None:
    """Refuse starts before any is trained; no weight is read.

    Args:
        starts: recipes as text, folders of models, or "none".
        source: its parameters may be shapes.

    Raises:
        BadInput: no recipe, one that the source has no layers or widths for, a model of another vocabulary.
    """
    from kvx.train.convert import recipe_for

    for start in starts:
        if start == UNCONVERTED:
            continue
        if isdir(start):
            model = abstract_model(model_config(start), jnp.float32)
            if model.vocabulary != source.vocabulary:
                raise BadInput(
                    f"start={start!r} has a vocabulary of {model.vocabulary}; allowed: the source's {source.vocabulary}"
                )
        else:
            recipe_for(source, start)


def _command(
    out: Annotated[Path, typer.Argument(help="A folder for all curves.")],
    start: Annotated[list[str], typer.Option(help='A recipe, as "transmla(rank=64, rotary=32)"; a folder; or "none".')],
    train: Annotated[Path, typer.Option(help="Token ids: .npy, or .bin.")],
    judge: Annotated[Path, typer.Option("--held-out", help="Other token ids, to judge by.")],
    tokens_dtype: Annotated[RawIds, typer.Option(help="Of a .bin file.")] = "uint16",
    model: Annotated[str, typer.Option(help="Source and teacher: a zoo name, a directory, a .gguf file.")] = (
        "smollm2-135m-instruct"
    ),
    seed: Annotated[list[int] | None, typer.Option(help="Of the order of rows; several for several curves.")] = None,
    tokens: Annotated[int, typer.Option(help="Of a curve.", min=1)] = 100_000,
    length: Annotated[int, typer.Option(help="Tokens of a row.", min=2)] = 256,
    batch: Annotated[int, typer.Option(help="Rows of a step.", min=1)] = 8,
    rate: Annotated[float, typer.Option(help="Learning rate, at its peak.")] = 3e-4,
    warmup: Annotated[float, typer.Option(help="Share of the steps.", min=0, max=0.9)] = 0.05,
    schedule: Annotated[str, typer.Option(help="cosine, constant or wsd.")] = "cosine",
    trained: Annotated[str, typer.Option("--trained", help='"all", "attention", or an expression.')] = "all",
    ce: Annotated[float, typer.Option(help="Weight of the cross-entropy.", min=0)] = 0.0,
    kl: Annotated[float, typer.Option(help="Weight of the divergence from the teacher.", min=0)] = 1.0,
    chunk: Annotated[int, typer.Option(help="Tokens whose logits exist at a time.", min=1)] = 2048,
    dtype: Annotated[str, typer.Option(help="Of both passes: float32 or bfloat16.")] = "float32",
    remat: Annotated[str, typer.Option(help="Activations to recompute, to save memory: none, dots or full.")] = "none",
    every: Annotated[int, typer.Option("--evaluations", help="Of a curve, after the one at its start.", min=1)] = 20,
    kept: Annotated[int, typer.Option("--checkpoints", help="Of a curve, from which it may go on.", min=1)] = 10,
    judged: Annotated[int, typer.Option(help="Held-out tokens.", min=1)] = 16384,
    asked: Annotated[int, typer.Option("--passkeys", help="Asked at every evaluation, of a row's length.", min=0)] = 0,
    calibration: Annotated[int, typer.Option(help="Rows that conversions read, from the text's end.", min=8)] = 128,
    seconds: Annotated[float | None, typer.Option(help="Wall-clock limit of a curve in this call.")] = None,
) -> None:
    """Train every start for as many tokens beside the same teacher.

    Examples:

        python -m kvx.train.curves runs/cpu --start "x_ecomla(rank=64, rotary=32)" --start none
        --train train.npy --held-out valid.npy --tokens 100000

        python -m kvx.train.curves runs/gpu --start "x_ecomla(rank=64, rotary=32)" --train train.npy
        --held-out valid.npy --tokens 20000000 --length 1024 --batch 32 --dtype bfloat16 --seconds 200
    """
    from kvx.compilation_cache import enable_compilation_cache

    if seed and min(seed) < 0:
        raise BadInput(f"seed={min(seed)}; allowed: integers of at least 0")
    loss = LossSection(ce=ce, kl=kl, chunk=chunk)
    values: dict[str, Any] = {
        "schedule": schedule,
        "compute_dtype": dtype,
        "warmup": warmup,
        "train": trained,
        "remat": remat,
    }
    stage = StageSection(tokens=tokens, batch=batch, learning_rate=rate, loss=loss, **values)
    steps = stage.total_steps(length)
    setting = Setting(model, stage, length, max(1, steps // every), judged, calibration, max(1, steps // kept), dtype)
    placement = make_placement(ALONG_ROWS)
    check_batch(placement, batch, 1, length)
    shapes = abstract_model(model_config(model), jnp.float32)
    check_starts(start, shapes)
    if length > shapes.max_positions:
        raise BadInput(f"length={length}; allowed: at most {shapes.max_positions}, the model's positions")
    text, other = (open_tokens(path, tokens_dtype, None, shapes.vocabulary).tokens for path in (train, judge))
    if calibration * length > MOST_CALIBRATION:
        raise BadInput(f"calibration={calibration}; allowed: at most {MOST_CALIBRATION // length} rows of {length}")
    if len(text) < length * max(batch, calibration):
        raise BadInput(f"train has {len(text)} tokens; allowed: at least {length * max(batch, calibration)}")
    make_folder(out, "out")
    enable_compilation_cache()
    console = Console(stderr=True)
    source, tokenizer = kvx.load(model, dtype="float32")
    hidden = prompts(tokenizer, tokenizer.decode(other.tolist()), length, asked) if asked else []
    questions = passkeys(tokenizer, hidden, batch) if hidden else []
    bench = Bench(source, text, other, questions, setting, placement, console)
    keys = [(each, number) for number in seed or [0] for each in start]
    for each, number in keys:
        console.print(f"{each}, seed {number}", highlight=False)
        with Interruption(seconds) as stop:
            bench.curve(each, number, folder_of(out, each, number), stop)
        collect(out, keys, batch * length)
        if stop.told:
            break
    for line in collect(out, keys, batch * length):
        if line["step"] in (0, steps):
            print(json.dumps(line))


app = program(_command)

if __name__ == "__main__":
    run(app, "python -m kvx.train.curves")
