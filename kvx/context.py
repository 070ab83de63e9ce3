"""What a policy's hooks are told: static facts, where they are called, and where a prompt's tokens stand."""

from dataclasses import dataclass
from typing import Any

from jaxtyping import Array, Bool, Float, Int

from kvx.decoder import AttentionSpec
from kvx.pytree import pytree, static


@dataclass(frozen=True)
class Spec:
    """Static facts under which one layer's cache is made.

    Attributes:
        attention: the layer's attention.
        layers: layers of the model.
        prompt: the most tokens a row's prompt may hold.
        shortest: the fewest tokens a row's prompt may hold.
        room: tokens to come after the prompt for which there must be slots.
    """

    attention: AttentionSpec
    layers: int
    prompt: int
    shortest: int
    room: int


@pytree
class Context:
    """Where a hook is called: the static spec and what only the run knows.

    Attributes:
        layer: index of the layer, traced, so that equal layers share one compiled body.
        lengths: length of each row's whole prompt, also while only a part of it has been seen.
        plan: this stage's and layer's share of a decision over all layers (`Stage.plan`); None if it decides by layer.
        storage: what earlier layers' stores put into the cache, for stores that share arrays.
        evicting: static; some stage of the policy frees slots while decoding (`Stage.evicts`).
    """

    layer: Int[Array, ""]
    lengths: Int[Array, "B"]
    spec: Spec = static()
    plan: Any = None
    storage: tuple[Any, ...] = ()
    evicting: bool = static(False)


@pytree
class Layout:
    """Where the tokens of a prompt stand.

    Attributes:
        positions: true positions, -1 for padding; tokens that do not see each other may share them.
        segments: labels by which `visibility` tells.
        visibility: entry (a, b): whether a token of label a sees one of label b; None: only those of its own label,
            and of label `SHARED` (`kvx.kernels.logits`).
    """

    positions: Int[Array, "B T"]
    segments: Int[Array, "B T"]
    visibility: Bool[Array, "N N"] | None = None


@pytree
class Activations:
    """What one layer computes, for calibration: N tokens, the same for every head.

    A sample over many texts; or, for a stage with a text of its own (`Stage.probe`), all tokens of that in order.

    Attributes:
        queries: rotated, R query heads for each KV head.
        keys: rotated.
        values: values.
        spec: the layer's attention.
    """

    queries: Float[Array, "G R N D"]
    keys: Float[Array, "G N D"]
    values: Float[Array, "G N V"]
    spec: AttentionSpec = static()
