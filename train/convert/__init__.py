"""Conversions of trained attention to latent attention, or to fewer heads: small parts, and recipes made of them.

moments = measure_moments(model, batches)
model, report = convert(model, recipe("transmla", rank=64, rotary=32), moments)
"""

from collections.abc import Sequence

from kvx.models.build import Model
from kvx.train.convert.fewer_heads import FewerHeads
from kvx.train.convert.latent_recipe import Recipe
from kvx.train.convert.moments import Moments, measure_moments
from kvx.train.convert.recipes import names, parse_recipe, recipe, recipe_for
from kvx.train.convert.report import Report

__all__ = [
    "FewerHeads",
    "Moments",
    "Recipe",
    "Report",
    "convert",
    "measure_moments",
    "names",
    "parse_recipe",
    "recipe",
    "recipe_for",
]


def convert(
    model: Model, recipe: Recipe | FewerHeads, moments: Sequence[Moments] | None = None
) -> tuple[Model, Report]:
    """The model with the attention that a recipe makes of it, and a report of every layer; the source stays as it is.

    Args:
        model: of `kvx.models`.
        recipe: what `recipe(name, ...)` returns.
        moments: of every layer, from `measure_moments`; may be None where `recipe.reads_text` is False.

    Raises:
        BadInput: widths or layers that the model does not have, attention that cannot be converted, missing moments.
    """
    return recipe(model, moments)
