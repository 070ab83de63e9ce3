"""The report of a conversion: what became of each layer, and the bytes that a token takes before and after."""

from dataclasses import asdict, dataclass
from typing import Any

import jax.numpy as jnp
from rich.table import Table

from kvx.decoder import Decoder


@dataclass(frozen=True)
class Converted:
    """What became of one layer.

    Attributes:
        layer: its index.
        kind: of attention: "latent" or "grouped".
        rank: latent channels; None where there is no latent.
        rotary: channels of the rotary key.
        kept: share of the energy of content keys and values that the latent keeps, in the recipe's own metric.
        before, after: numbers that are cached for each token.
    """

    layer: int
    kind: str
    rank: int | None
    rotary: int
    kept: float
    before: int
    after: int


@dataclass(frozen=True)
class Report:
    """What a conversion did, layer by layer; `print` it with rich, or read the numbers.

    Attributes:
        recipe: its name and parameters.
        layers: converted ones, and those that stayed.
        dtype: of a cached number; the model's own, unless it is to be saved in another.
    """

    recipe: str
    layers: tuple[Converted, ...]
    dtype: str

    @property
    def itemsize(self) -> int:
        """Bytes of a cached number."""
        return jnp.dtype(self.dtype).itemsize

    @property
    def before(self) -> int:
        """Cache bytes for each token of the source."""
        return self.itemsize * sum(layer.before for layer in self.layers)

    @property
    def after(self) -> int:
        """Of the converted model."""
        return self.itemsize * sum(layer.after for layer in self.layers)

    def as_json(self) -> dict[str, Any]:
        """Every layer, sizes in bytes for each token; and the sums."""
        layers = [
            asdict(each) | {"before": self.itemsize * each.before, "after": self.itemsize * each.after}
            for each in self.layers
        ]
        return {
            "recipe": self.recipe,
            "dtype": self.dtype,
            "before": self.before,
            "after": self.after,
            "layers": layers,
        }

    def __rich__(self) -> Table:
        """A line for each layer, and the sums."""
        share = f"{self.after / self.before:.1%}"
        before = f"{self.dtype} bytes before"
        table = Table("layer", "rank", "rotary", "energy kept", before, "after", title=self.recipe, show_footer=True)
        for column, text in zip(table.columns, ("", "", "", share, str(self.before), str(self.after)), strict=True):
            column.footer, column.justify = text, "right"
        for each in self.layers:
            sizes = (str(self.itemsize * size) for size in (each.before, each.after))
            rank = each.kind if each.rank is None else str(each.rank)
            table.add_row(str(each.layer), rank, str(each.rotary), f"{each.kept:.4f}", *sizes)
        return table


def cached_elements(model: Decoder, layer: int) -> int:
    """Numbers that a layer of ordinary or latent attention caches for each token."""
    spec = model.blocks[layer].spec
    return spec.kv_heads * (spec.key_dim + (0 if spec.latent else spec.value_dim))
