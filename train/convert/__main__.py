"""Convert a model and save it, compare conversions, or export one to DeepSeek's format: python -m kvx.train.convert."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import jax.numpy as jnp
import typer
from rich.console import Console
from rich.table import Table

import kvx
from kvx.cli import program, run
from kvx.destinations import make_folder
from kvx.errors import BadInput
from kvx.models.build import Model, abstract_model
from kvx.train.convert import convert, measure_moments, recipe_for
from kvx.train.convert.perplexity import perplexity, windows
from kvx.train.data import Documents, Encoding, open_documents
from kvx.train.shapes import model_config

Source = Annotated[str, typer.Option("--model", help="A zoo name, a Hugging Face directory, or a .gguf file.")]
Text = Annotated[str, typer.Option(help="Text to calibrate on: a file or folder, as a job's data.train.")]
Rows = Annotated[int, typer.Option(help="Windows of text to calibrate on.", min=1)]
Width = Literal["bfloat16", "float32"]
Length = Annotated[int, typer.Option(help="Tokens of a window.", min=2)]


def apply(
    recipe: Annotated[str, typer.Argument(help='Such as "transmla(rank=64, rotary=32)".')],
    out: Annotated[Path, typer.Argument(help="A new directory, which kvx.load reads.")],
    model: Source = "smollm2-135m-instruct",
    text: Annotated[str | None, typer.Option(help="Text to calibrate on, for recipes that read any.")] = None,
    calibration: Rows = 128,
    length: Length = 256,
) -> None:
    """Convert a model's attention and save the result, without training.

    Example:

        python -m kvx.train.convert apply "x_ecomla(rank=16, rotary=32)" smollm-latent
    """
    from kvx.compilation_cache import enable_compilation_cache

    chosen = recipe_for(_shapes(model), recipe)
    if chosen.reads_text and text is None:
        raise BadInput(f"text=None, but {recipe} reads text; allowed: a file of it")
    _check_out(out)
    read = None if text is None else open_documents([text], "text")
    enable_compilation_cache()
    source, tokenizer = kvx.load(model)
    moments = None
    if chosen.reads_text and read is not None:
        moments = _moments(source, tokenizer, read, calibration, length)
    converted, report = convert(source, chosen, moments)
    Console().print(report)
    kvx.save(converted, tokenizer, out)


def compare(
    recipes: Annotated[list[str], typer.Argument(help='Such as "transmla(rank=64, rotary=32)".')],
    text: Text,
    held_out: Annotated[str, typer.Option(help="Other text, to measure on.")],
    model: Source = "smollm2-135m-instruct",
    calibration: Rows = 128,
    measured: Annotated[int, typer.Option(help="Windows of text to measure on.", min=1)] = 64,
    length: Length = 256,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line instead of a table.")] = False,
) -> None:
    """Held-out perplexity of conversions before any training, beside the source's.

    Example:

        python -m kvx.train.convert compare "transmla(rank=64, rotary=32)" "by_effect(rank=64, rotary=32)"
        --text train-00.jsonl.gz --held-out valid.jsonl.gz
    """
    from kvx.compilation_cache import enable_compilation_cache

    shapes = _shapes(model)
    chosen = [recipe_for(shapes, each) for each in recipes]
    read, other = open_documents([text], "text"), open_documents([held_out], "held_out")
    enable_compilation_cache()
    source, tokenizer = kvx.load(model)
    judged = windows(Encoding.of(tokenizer), other, measured, length)
    moments = None
    if any(each.reads_text for each in chosen):
        moments = _moments(source, tokenizer, read, calibration, length)
    dtype = str(source.embedding.table.dtype)
    table = Table("conversion", "cache", f"bytes a token, {dtype}", "perplexity")

    def add(name: str, share: float, size: int, found: float) -> None:
        if as_json:
            row = {"recipe": name, "share": share, "bytes": size, "dtype": dtype, "perplexity": found}
            print(json.dumps(row), flush=True)
        table.add_row(name, f"{share:.1%}", str(size), f"{found:.2f}")

    base = perplexity(source, judged)
    for index, each in enumerate(chosen):
        converted, report = convert(source, each, moments)
        if index == 0:
            add("source", 1.0, report.before, base)
        add(each.text, report.after / report.before, report.after, perplexity(converted, judged))
    if not as_json:
        Console().print(table)


def export(
    model: Annotated[str, typer.Argument(help="A model whose layers all have latent attention: a job's model/.")],
    out: Annotated[Path, typer.Argument(help="A new directory, which transformers loads as DeepseekV3ForCausalLM.")],
    dtype: Annotated[Width, typer.Option(help="Of the weights.")] = "bfloat16",
) -> None:
    """Write a converted model as a DeepSeek-V3, which other libraries run; what that cannot hold is refused.

    Example:

        python -m kvx.train.convert export runs/by_effect_smollm2_135m/model smollm-deepseek
    """
    from kvx.models.deepseek import save_deepseek

    _check_out(out)
    source, tokenizer = kvx.load(model, dtype=jnp.dtype(dtype))
    save_deepseek(source, tokenizer, out)


def _check_out(out: Path) -> None:
    """A directory can be written there, which is new or empty."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadInput(f"out={str(out)!r} is in the way; allowed: a new directory, or an empty one")
    make_folder(out.absolute().parent, "out")


def _shapes(model: str) -> Model:
    """The source with shapes for parameters, for checks before weights are read."""
    return abstract_model(model_config(model), jnp.bfloat16)


def _moments(source: Any, tokenizer: Any, text: Documents, count: int, length: int) -> Any:
    """Of the source's activations over the first windows of a text."""
    rows = windows(Encoding.of(tokenizer), text, count, length)
    return measure_moments(source, [rows[start : start + 8] for start in range(0, len(rows), 8)])


app = program(apply, compare, export)

if __name__ == "__main__":
    run(app, "python -m kvx.train.convert")
