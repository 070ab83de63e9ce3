"""Named conversions: each a paper, its defaults, and a few lines that put parts together.

A recipe is called with a model, and with moments of its inputs where it looks at text:

    model, report = transmla(rank=64, rotary=32)(model, measure_moments(model, batches))
"""

import ast
import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, get_type_hints

from kvx.errors import BadInput, unknown
from kvx.models.build import Model
from kvx.section import accepts, allowed
from kvx.train.convert.concentrated import Concentrated, Unsteady
from kvx.train.convert.factorisation import joint, separate
from kvx.train.convert.fewer_heads import FewerHeads
from kvx.train.convert.latent_recipe import Recipe
from kvx.train.convert.query_latent import Direct, QueryLatent, QueryRule
from kvx.train.convert.ranks import Budget, Energy, Fixed, Ranks, rounded_up
from kvx.train.convert.rotary_split import ChosenPairs, SharedMean, Split
from kvx.train.convert.weighing import ByActivations, ByEffect, ByWeights

Layers = Literal["all"] | tuple[int, ...]

_RECIPES: dict[str, Callable[..., Recipe | FewerHeads]] = {}


def named(build: Callable[..., Recipe | FewerHeads]) -> Callable[..., Recipe | FewerHeads]:
    """Register a function that builds a conversion, under its own name; the result's text is the call."""
    build = inspect.unwrap(build)
    signature, kinds = inspect.signature(build), get_type_hints(build)

    @functools.wraps(build)
    def checked(*arguments: Any, **parameters: Any) -> Recipe | FewerHeads:
        for name in parameters:
            if name not in signature.parameters:
                raise unknown(f"parameter of {build.__name__}", name, signature.parameters)
        try:
            bound = signature.bind(*arguments, **parameters)
        except TypeError as error:
            raise BadInput(f"{build.__name__}: {error}; allowed: {', '.join(signature.parameters)}") from None
        for name, value in bound.arguments.items():
            if not accepts(value, kinds[name]):
                raise BadInput(f"{name}={value!r} of {build.__name__}; allowed: {allowed(kinds[name])}")
        text = ", ".join(f"{name}={value!r}" for name, value in bound.arguments.items())
        return replace(build(*bound.args, **bound.kwargs), text=f"{build.__name__}({text})")

    _RECIPES[build.__name__] = checked
    return checked


def names() -> tuple[str, ...]:
    """Every named conversion, in alphabetical order."""
    return tuple(sorted(_RECIPES))


def recipe(name: str, **parameters: Any) -> Recipe | FewerHeads:
    """A conversion by name, as configs write it: `recipe("transmla", rank=64, rotary=32)`.

    Raises:
        BadInput: no such conversion (the nearest is suggested), or a parameter it does not take.
    """
    if name not in _RECIPES:
        raise unknown("conversion", name, _RECIPES)
    return _RECIPES[name](**parameters)


@named
def x_ecomla(
    rank: int,
    rotary: int = 32,
    query_rank: int | None = None,
    energy: float | None = None,
    query_energy: float | None = None,
    factorisation: str = "joint",
    singular: str = "down",
    layers: Layers = "all",
    norm: bool = False,
) -> Recipe:
    """X-EcoMLA (Li et al. 2025): SVD of the weights [W_K ; W_V] and of W_Q; a rotary key of last channels, averaged.

    Weights only. Positions have to be learned again: see `SharedMean`.

    The released code repeats keys and values to all H = g G query heads before its SVD, this one does not. The product
    and the ranks by energy are the same, but with singular values "down" its latent is sqrt(g) times larger and its up
    projections as much smaller. Adam moves every entry by the learning rate: here the product follows the down
    projection more by sqrt(g), and the up projection less. What `train/RESULTS.md` reports began from this start.

    Args:
        rank: latent channels; with `energy`, of the model's first and last layer.
        rotary: channels of the rotary key.
        query_rank: channels of the query latent, rounded up to a multiple of 8; None: no query latent. The paper's
            keeps the attention's number of parameters (400 for SmolLM-135M at rank 16).
        energy: share that each layer's rank keeps, rounded up to a multiple of 8 (the paper: 0.95).
        query_energy: likewise of the query latent (0.98); needs `query_rank`.
        factorisation: "joint" or "separate", its ablation.
        singular: "down" as in the code, "up" as in the paper's listing, or "split".
        layers: "all" or indices.
        norm: RMS norm on the latent; the released models have none.
    """
    queries: QueryRule = Direct()
    if query_rank is not None:
        fixed = rounded_up(_positive(query_rank, "query_rank"), 8)
        name = "query_rank"
        queries = QueryLatent(
            Fixed(fixed, name) if query_energy is None else Energy(query_energy, fixed, name, "query_energy")
        )
    elif query_energy is not None:
        raise BadInput(f"query_energy={query_energy} without query_rank; allowed: both, since the ends' rank is fixed")
    ranks: Ranks = Fixed(rank) if energy is None else Energy(energy, rank, share_name="energy")
    return Recipe(
        SharedMean(rotary), ByWeights(), ranks, _factorisation(factorisation), _side(singular), queries, layers, norm
    )


@named
def mha2mla(
    rank: int,
    rotary: int,
    choice: str = "norm",
    factorisation: str = "joint",
    singular: str = "up",
    layers: Layers = "all",
    norm: bool = False,
) -> Recipe:
    """MHA2MLA (Ji et al. 2025): each KV head rotates its own strongest pairs; SVD of the other keys with the values.

    Args:
        rank: latent channels in all; the paper's low rank times G (D/2, D/4 or D/8 times G).
        rotary: rotary channels of all KV heads together; the paper's D/8 times G.
        choice: of pairs: "norm", "high", "low" or "uniform"; only "norm" needs moments.
        factorisation: "joint", or "separate", the paper's split; here both share `rank`.
        singular: where singular values go.
        layers: "all" or indices.
        norm: RMS norm on the latent.
    """
    how = _factorisation(factorisation)
    return Recipe(ChosenPairs(rotary, choice), ByWeights(), Fixed(rank), how, _side(singular), layers=layers, norm=norm)


@named
def transmla(
    rank: int,
    rotary: int,
    fold: int = 4,
    alpha: float = 1.0,
    query_rank: int | None = None,
    layers: Layers = "all",
    norm: bool = False,
) -> Recipe:
    """TransMLA (Meng et al. 2025): RoRoPE and FreqFold, balanced keys and values, their joint principal components.

    Args:
        rank: latent channels; up to 2 G D - rotary, where nothing but the left-out rotations is lost.
        rotary: channels of the rotary key; G D with fold=1 rotates everything, which is exact.
        fold: neighbouring frequencies taken for one; a multiple of D / rotary (the paper: 4 or 8, by perplexity).
        alpha: size of balanced keys beside values.
        query_rank: channels of a query latent; None: none.
        layers: "all" or indices.
        norm: RMS norm on the latent.
    """
    queries: QueryRule = (
        Direct() if query_rank is None else QueryLatent(Fixed(query_rank, "query_rank"), by_activations=True)
    )
    weighing = ByActivations(alpha=alpha)
    return Recipe(Concentrated(rotary, fold), weighing, Fixed(rank), queries=queries, layers=layers, norm=norm)


@named
def by_effect(
    rank: int,
    rotary: int,
    layers: Layers = "all",
    norm: bool = False,
    spread: bool = False,
    attended: bool = True,
    mean_phase: bool = True,
    fold: int | None = None,
) -> Recipe:
    """Our own start: rotation where phases vary under attention, and a latent for the errors that reach the output.

    The last three take it apart, to see what each does.

    Args:
        rank: latent channels, on average over layers if they are `spread`.
        rotary: channels of the rotary key.
        layers: "all" or indices.
        norm: RMS norm on the latent.
        spread: give each layer the rank at which all lose about the same share.
        attended: count each token by the attention that it gets; otherwise all alike.
        mean_phase: pairs that stay unrotated turn by their mean phase; otherwise not at all.
        fold: TransMLA's rotary split instead, of so many neighbouring frequencies; None: ours.
    """
    if fold is not None and not mean_phase:
        raise BadInput(f"mean_phase=False with fold={fold}; allowed: one of the two, that split has no mean phases")
    split: Split = Unsteady(rotary, mean_phase, attended) if fold is None else Concentrated(rotary, fold)
    ranks: Ranks = Budget(rank, name="rank") if spread else Fixed(rank)
    return Recipe(split, ByEffect(attended), ranks, joint, "split", layers=layers, norm=norm)


@named
def gqa(kv_heads: int, pooling: str = "mean") -> FewerHeads:
    """Fewer KV heads (Ainslie et al. 2023; Yu et al. 2024): not latent attention, but what it is measured against.

    Args:
        kv_heads: how many are left; divides the model's.
        pooling: "mean", or "svd" for principal components, which need moments.
    """
    return FewerHeads(kv_heads, pooling)


def _factorisation(name: str) -> Callable[..., Any]:
    known = {"joint": joint, "separate": separate}
    if name not in known:
        raise unknown("factorisation", str(name), known)
    return known[name]


def _side(singular: str) -> Any:
    if singular not in ("down", "up", "split"):
        raise unknown("side of singular values", str(singular), ("down", "up", "split"))
    return singular


def _positive(value: int, name: str) -> int:
    if type(value) is not int or value < 1:
        raise BadInput(f"{name}={value!r} is out of range; allowed: integers of at least 1")
    return value


def parse_recipe(text: str) -> Recipe | FewerHeads:
    """A conversion from the text that it is shown by: "transmla(rank=64, rotary=32)". Nothing is evaluated.

    Raises:
        BadInput: not a call with literal arguments, an unknown name or parameter.
    """
    try:
        call = ast.parse(text.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            raise ValueError
        name = call.func.id
        positional = [ast.literal_eval(argument) for argument in call.args]
        parameters = {str(each.arg): ast.literal_eval(each.value) for each in call.keywords}
    except (ValueError, SyntaxError):
        raise BadInput(
            f"conversion {text!r} cannot be read; allowed: a call such as transmla(rank=64, rotary=32)"
        ) from None
    if name not in _RECIPES:
        raise unknown("conversion", name, _RECIPES)
    return _RECIPES[name](*positional, **parameters)


def recipe_for(model: Model, text: str) -> Recipe | FewerHeads:
    """As `parse_recipe`, checked against a model whose parameters may be shapes.

    Raises:
        BadInput: so too; layers or widths that the model does not have, attention that cannot be converted.
    """
    found = parse_recipe(text)
    try:
        found.shapes(model, rank=1)  # ranks that follow from weights go with any
    except BadInput as error:
        raise BadInput(f"{found.text}: {error}") from None
    return found
