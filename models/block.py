"""The decoder block that the families share: a norm, an attention of any kind, and what each family does with it."""

from dataclasses import dataclass
from typing import Any

from flax import nnx
from jaxtyping import Array, Float

from kvx.decoder import AttentionSpec
from kvx.models.attention import Attention
from kvx.models.layers import RMSNorm
from kvx.rotary import Rotary


class DecoderBlock(nnx.Module):
    """One decoder layer around `attention_norm` and `attention`; satisfies `kvx.decoder.Block`."""

    attention_norm: RMSNorm
    attention: Any

    @property
    def spec(self) -> AttentionSpec:
        """Static facts of its attention."""
        return self.attention.spec

    @property
    def rotary(self) -> Rotary:
        """This layer's rotation."""
        return self.attention.rotary

    @property
    def expanded(self) -> "Expanded":
        """The same layer with its attention in the form for whole texts."""
        return Expanded(self, self.attention.expanded)

    def project(
        self, x: Float[Array, "B T E"]
    ) -> tuple[Float[Array, "B T H D"], Float[Array, "B T G D"], Float[Array, "B T G V"]]:
        """Unrotated queries, keys and values of the layer's input."""
        return self.attention.project(self.attention_norm(x))

    def finish(self, x: Float[Array, "B T E"], out: Float[Array, "B T H V"]) -> Float[Array, "B T E"]:
        """The layer's output from its input and the attention output of every head."""
        return self.join(x, self.attention.output(out, x.dtype))

    def join(self, x: Float[Array, "B T E"], attended: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """The layer's output from its input and what attention adds to it."""
        raise NotImplementedError


@dataclass(frozen=True)
class Expanded:
    """A block that projects to, and finishes from, another form of its attention."""

    block: DecoderBlock
    attention: Attention

    @property
    def spec(self) -> AttentionSpec:
        """Static facts of this form."""
        return self.attention.spec

    @property
    def rotary(self) -> Rotary:
        """The layer's rotation."""
        return self.attention.rotary

    @property
    def expanded(self) -> "Expanded":
        """Itself."""
        return self

    def project(
        self, x: Float[Array, "B T E"]
    ) -> tuple[Float[Array, "B T H D"], Float[Array, "B T G D"], Float[Array, "B T G V"]]:
        """Unrotated queries, keys and values of the layer's input."""
        return self.attention.project(self.block.attention_norm(x))

    def own(self, rotated: Float[Array, "B T H D"]) -> Float[Array, "B T H K"]:
        """Of rotated queries or keys, the channels that each head itself compares."""
        return self.attention.own(rotated)

    def finish(self, x: Float[Array, "B T E"], out: Float[Array, "B T H V"]) -> Float[Array, "B T E"]:
        """The layer's output from its input and the attention output of every head."""
        return self.block.join(x, self.attention.output(out, x.dtype))
