"""Training the feature maps of LESS: layer by layer beside a frozen model, each layer's result kept as it comes.

python -m kvx.train.less --help
"""

import hashlib
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from jaxtyping import Array, Float, Int
from rich.console import Console

import kvx
from kvx.cli import program, run
from kvx.context import Spec
from kvx.decoder import Block, Decoder
from kvx.destinations import check_file
from kvx.errors import BadInput
from kvx.inputs import checked_prompt
from kvx.loop import attend
from kvx.parts.amounts import whole
from kvx.parts.evict import Evict
from kvx.parts.feature_state import Absorb, FeatureMaps
from kvx.parts.losers import Drop
from kvx.policy import Policy
from kvx.prefill import embed
from kvx.progress import Steps
from kvx.prose import documents, prose
from kvx.train.feature_maps import Settings, train_layer
from kvx.train.layer_record import LayerRecord, record_layer

DEFAULT = Settings()

TOGETHER = 8
"""Texts that are recorded at a time, so that the peak does not grow with their number."""


def train(
    policy: Policy,
    model: Decoder,
    texts: Int[np.ndarray, "B T"],
    settings: Settings = DEFAULT,
    *,
    prompt: int | None = None,
    out: Path | None = None,
    console: Console | None = None,
) -> tuple[Policy, list[float]]:
    """The policy with trained maps, and for each layer the share of the sparse policy's error that they leave.

    Every layer is trained alone, on what full attention feeds it: the policy's selection runs over its tokens row by
    row, what left is weighed by the maps, and the layer's attention output is to be that of the full cache.

    Args:
        policy: less(...); its budget, host and sizes. Maps it already has are replaced.
        model: frozen.
        texts: of full length, as long as what is to come.
        prompt: tokens of each text that come at once, before rows are simulated and learned from. None: the budget, as
            in the paper, where every row is.
        out: the file to write. Until it is, finished layers lie beside it, under a name of their own for every
            setting: a run that was interrupted goes on there. None: nothing is written.
        console: for the progress bar; None: standard error.

    Raises:
        BadInput: a policy without maps to train, texts that do not fit, a prompt that leaves no row.
    """
    stage = _stage(policy)
    absorb, host = stage.losers, replace(stage, losers=Drop())
    tokens, _ = checked_prompt(model, texts, None, (policy,), 0)
    layers, length = len(model.blocks), tokens.shape[1]
    if prompt is None:
        prompt = host.capacity(Spec(model.blocks[0].spec, layers, length, length, 0), 0)
    whole(prompt, "prompt", least=1, most=length - 1)
    kept = None if out is None else out.absolute().parent / _name(policy, model, tokens, settings, prompt)
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
    x, found, left = embed(model, tokens), [], []
    with Steps(layers, console) as steps:
        for layer, block in enumerate(model.blocks):
            steps(f"layer {layer + 1}/{layers}" + (f", {left[-1]:.2f} of the error left in the last" if left else ""))
            done = None if kept is None else next(iter(kept.glob(f"{layer:03d}-*.safetensors")), None)
            if done is not None:
                maps, share = _stage(kvx.load_policy(done)).losers.maps.at(0), float(done.stem.partition("-")[2])
            else:
                record = _record(Policy((host,), policy.text), block, x, layer, layers, prompt)
                first, second = jax.random.split(jax.random.fold_in(jax.random.key(settings.seed), layer))
                start = absorb.initial(first, block.spec)
                maps, share = train_layer(record, _output_matrix(block), start, second, settings)
                if kept is not None:
                    alone = with_maps(policy, jax.tree.map(lambda array: array[None], maps))
                    kvx.save_policy(alone, kept / f"{layer:03d}-{share:.6f}.safetensors")
            found.append(maps)
            left.append(share)
            x = _next(block, x)
    trained = with_maps(policy, jax.tree.map(lambda *arrays: jnp.stack(arrays), *found))
    if out is not None and kept is not None:
        kvx.save_policy(trained, out)
        shutil.rmtree(kept)
    return trained, left


def with_maps(policy: Policy, maps: FeatureMaps) -> Policy:
    """The policy with these maps."""
    stage = _stage(policy)
    changed = replace(stage, losers=replace(stage.losers, maps=maps))
    return replace(policy, stages=tuple(changed if each is stage else each for each in policy.stages))


def _stage(policy: Policy) -> Evict:
    """The one stage whose losers are absorbed.

    Raises:
        BadInput: there is none.
    """
    found = [stage for stage in policy.stages if isinstance(stage, Evict) and isinstance(stage.losers, Absorb)]
    if len(found) != 1:
        raise BadInput(f"policy {policy.text!r} has no feature maps to train; allowed: less(...)")
    return found[0]


def _name(policy: Policy, model: Decoder, tokens: Int[Array, "B T"], settings: Settings, prompt: int) -> str:
    """A folder's name that no other setting, text or model shares."""
    weights = np.asarray(_output_matrix(model.blocks[0]))
    facts = repr((policy.text, settings, prompt, tokens.shape, len(model.blocks)))
    digest = hashlib.sha256(facts.encode() + np.asarray(tokens).tobytes() + weights.tobytes())
    return f"layers-{digest.hexdigest()[:16]}"


def _output_matrix(block: Any) -> Float[Array, "I E"]:
    """What takes the heads' outputs to the residual stream; every block of `kvx.models` calls it `out`."""
    return block.attention.out.kernel[...]


@jax.jit
def _next(block: Block, x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
    positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
    return attend(block, x, positions)[0]


def _record(
    policy: Policy, block: Block, x: Float[Array, "B T E"], layer: int, layers: int, prompt: int
) -> LayerRecord:
    parts = [
        record_layer(policy, block, x[start : start + TOGETHER], jnp.int32(layer), layers=layers, prompt=prompt)
        for start in range(0, len(x), TOGETHER)
    ]
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *parts)


def _command(
    out: Annotated[Path, typer.Argument(help="The file to write, which kvx.load_policy reads.")],
    model: Annotated[str, typer.Option(help="A zoo name, a Hugging Face directory, or a .gguf file.")] = (
        "smollm2-135m-instruct"
    ),
    policy: Annotated[str, typer.Option("--policy", "-p", help="less(...): the host, its budget, the maps' sizes.")] = (
        "less(budget=256)"
    ),
    texts: Annotated[int, typer.Option(help="Texts to learn from; the last tenth is held back to judge.", min=1)] = 16,
    length: Annotated[int, typer.Option(help="Tokens of each text: as long as what is to come.", min=2)] = 1024,
    prompt: Annotated[
        int | None, typer.Option(help="Tokens of each text that come at once. Default: the budget, as in the paper.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="A folder of .txt or .md files. Default: Python's documentation, first half.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of Adam for each layer.", min=1)] = Settings.steps,
    batch: Annotated[int, typer.Option(help="Texts of a step.", min=1)] = Settings.batch,
    rows: Annotated[int, typer.Option(help="Rows of each text of a step.", min=1)] = Settings.rows,
    rate: Annotated[float, typer.Option(help="Of Adam; halved after every quarter.", min=0)] = Settings.rate,
    dropout: Annotated[float, typer.Option(help="Of hidden units.", min=0, max=0.9)] = Settings.dropout,
    seed: Annotated[int, typer.Option(help="Of everything random.", min=0)] = Settings.seed,
) -> None:
    """Train the feature maps of LESS for a model and a budget.

    An interrupted run goes on where it was, if started again with the same settings: finished layers lie in a folder
    beside the output until all are done.

    Examples:

        python -m kvx.train.less less.safetensors

        python -m kvx.train.less small.safetensors -p "less(budget=64, hidden=64)" --length 512 --steps 300

        kvx generate smollm2-135m-instruct "Once" --policy less.safetensors
    """
    from kvx.compilation_cache import enable_compilation_cache

    chosen = kvx.parse_policy(policy)
    _stage(chosen)
    check_file(out, "out")
    settings = Settings(steps, batch, rows, rate, dropout, seed=seed)
    source = prose(text)
    enable_compilation_cache()
    decoder, tokenizer = kvx.load(model)
    rows_of_text = documents(tokenizer, source.haystack, texts, length)
    trained, left = train(chosen, decoder, rows_of_text, settings, prompt=prompt, out=out)
    print(f"{out}: {trained.text}, {trained.nbytes / 2**20:.1f} MiB of maps")
    print("share of the sparse cache's squared error that is left, by layer: " + " ".join(f"{x:.2f}" for x in left))
    print(f"mean {np.mean(left):.3f}")


app = program(_command)

if __name__ == "__main__":
    run(app, "python -m kvx.train.less")
