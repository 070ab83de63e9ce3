"""The feature state: losers live on in a linear attention of constant size, under one softmax with the survivors."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from kvx.context import Context, Spec
from kvx.decoder import AttentionSpec
from kvx.errors import BadInput
from kvx.evidence import Evidence
from kvx.kernels.merge_partials import Partial
from kvx.parts.losers import Losers
from kvx.pytree import pytree, static
from kvx.query import Query
from kvx.tokens import Tokens

SCALE = 1e-4
"""Where the scales of the key map start: the state says almost nothing until it has learned to."""


def _whole(hidden: Array) -> Array:
    return hidden


@pytree
class FeatureMaps:
    """Positive features of rotated queries and keys, by head (LESS, Dong et al. 2024, section 3.2).

        phi(q) = | gelu(gelu(q A1) A2) |,    u = |s1| gelu(gelu(k B1) B2),    psi(k) = | u + s2 (u C) |

    phi(q) . psi(k) stands for exp(scale q . k): absolute values make every product positive, so that no denominator
    cancels. M features, U hidden units; queries have maps by query head, keys by KV head.

    Attributes:
        query_in, query_out: A1 and A2.
        key_in, key_out, key_mix: B1, B2 and C.
        key_scale, mix_scale: s1 and s2.
    """

    query_in: Float[Array, "*layers H D U"] | None = None
    query_out: Float[Array, "*layers H U M"] | None = None
    key_in: Float[Array, "*layers G D U"] | None = None
    key_out: Float[Array, "*layers G U M"] | None = None
    key_mix: Float[Array, "*layers G M M"] | None = None
    key_scale: Float[Array, "*layers G M"] | None = None
    mix_scale: Float[Array, "*layers G M"] | None = None

    @staticmethod
    def shapes(attention: AttentionSpec, hidden: int, features: int) -> dict[str, tuple[int, ...]]:
        """Of one layer's arrays, by name."""
        heads, groups, dim = attention.heads, attention.kv_heads, attention.key_dim
        return {
            "query_in": (heads, dim, hidden),
            "query_out": (heads, hidden, features),
            "key_in": (groups, dim, hidden),
            "key_out": (groups, hidden, features),
            "key_mix": (groups, features, features),
            "key_scale": (groups, features),
            "mix_scale": (groups, features),
        }

    @classmethod
    def random(cls, key: Key[Array, ""], attention: AttentionSpec, hidden: int, features: int) -> "FeatureMaps":
        """One layer's maps before training: uniform weights of variance 2 / (in + out), scales of 1e-4."""

        def start(index: int, shape: tuple[int, ...]) -> Float[Array, "..."]:
            if len(shape) == 2:
                return jnp.full(shape, SCALE, jnp.float32)
            bound = (6 / (shape[-2] + shape[-1])) ** 0.5
            return jax.random.uniform(jax.random.fold_in(key, index), shape, jnp.float32, -bound, bound)

        shapes = cls.shapes(attention, hidden, features)
        return cls(**{name: start(index, shape) for index, (name, shape) in enumerate(shapes.items())})

    def at(self, layer: Int[Array, ""] | int) -> "FeatureMaps":
        """One layer's maps."""
        return jax.tree.map(lambda array: array[layer], self)

    def phi(
        self, queries: Float[Array, "B G R T D"], drop: Callable[[Array], Array] = _whole
    ) -> Float[Array, "B G R T M"]:
        """One layer's features of rotated queries, float32.

        Args:
            drop: what training does to the hidden units.
        """
        assert self.query_in is not None and self.query_out is not None, "checked when the policy is used"
        kv_heads, group = queries.shape[1:3]
        first, second = (array.reshape(kv_heads, group, *array.shape[1:]) for array in (self.query_in, self.query_out))
        hidden = _gelu(drop(jnp.einsum("bgrtd,grdu->bgrtu", queries.astype(jnp.float32), first)))
        return jnp.abs(_gelu(jnp.einsum("bgrtu,grum->bgrtm", hidden, second)))

    def psi(self, keys: Float[Array, "B G T D"], drop: Callable[[Array], Array] = _whole) -> Float[Array, "B G T M"]:
        """One layer's features of rotated keys, float32."""
        assert self.key_in is not None and self.key_out is not None and self.key_mix is not None
        assert self.key_scale is not None and self.mix_scale is not None
        hidden = _gelu(drop(jnp.einsum("bgtd,gdu->bgtu", keys.astype(jnp.float32), self.key_in)))
        plain = _gelu(jnp.einsum("bgtu,gum->bgtm", hidden, self.key_out)) * jnp.abs(self.key_scale)[:, None]
        return jnp.abs(plain + jnp.einsum("bgtm,gmn->bgtn", plain, self.key_mix) * self.mix_scale[:, None])


def _gelu(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=False)


@pytree
class FeatureState:
    """What is left of any number of tokens: sums over their features psi, float32 whatever the cache's dtype.

    Bytes per KV head: 4 M (V + 1). Sums of a set: the order in which tokens come is forgotten.

    Attributes:
        values: H = sum psi(k) v^T.
        mass: z = sum psi(k).
    """

    values: Float[Array, "B G M V"]
    mass: Float[Array, "B G M"]

    @classmethod
    def empty(cls, batch: int, kv_heads: int, features: int, width: int) -> "FeatureState":
        """Of no token."""
        shape = (batch, kv_heads, features)
        return cls(jnp.zeros((*shape, width), jnp.float32), jnp.zeros(shape, jnp.float32))

    def add(
        self, features: Float[Array, "B G T M"], values: Float[Array, "B G T V"], present: Bool[Array, "B G T"]
    ) -> "FeatureState":
        """With the tokens that are `present` of some."""
        features = jnp.where(present[..., None], features, 0.0)
        values = jnp.where(present[..., None], values.astype(jnp.float32), 0.0)
        return FeatureState(
            self.values + jnp.einsum("bgtm,bgtv->bgmv", features, values), self.mass + jnp.sum(features, axis=2)
        )

    def read(self, features: Float[Array, "B G R T M"]) -> Partial:
        """Attention by features phi of queries: out = phi H / phi z, lse = log phi z; (0, -inf) of no mass.

        The reference adds 1e-6 inside its logarithms; without it the two sides are exact to the last token.
        """
        mass = jnp.einsum("bgrtm,bgm->bgrt", features, self.mass)
        held = mass > jnp.finfo(jnp.float32).tiny
        divisor = jnp.where(held, mass, 1.0)
        out = jnp.einsum("bgrtm,bgmv->bgrtv", features, self.values) / divisor[..., None]
        return Partial(jnp.where(held[..., None], out, 0.0), jnp.where(held, jnp.log(divisor), -jnp.inf))


@pytree
class Absorb(Losers):
    """Into the feature state of their head, each once, at the moment they leave.

    Attributes:
        maps: of all layers; without arrays until trained (`python -m kvx.train.less`).
        features: M.
        hidden: U.
    """

    maps: FeatureMaps = FeatureMaps()
    features: int = static(8)
    hidden: int = static(512)
    recalls: ClassVar[bool] = True
    values_apart: ClassVar[bool] = True

    def objection(self, layers: Mapping[int, AttentionSpec]) -> str | None:
        """It has to be trained before."""
        if self.maps.query_in is not None:
            return None
        return (
            "is not trained, its feature maps have no arrays; allowed: python -m kvx.train.less first, then "
            "kvx.load_policy(path)"
        )

    def check(self, spec: Spec) -> None:
        """Maps of this model's shapes; no sliding window.

        Raises:
            BadInput: otherwise.
        """
        attention = spec.attention
        if attention.window is not None:
            raise BadInput(
                f"the model has a sliding window of {attention.window} tokens, and a feature state cannot tell which "
                "of its tokens have left it; allowed: layers that see everything"
            )
        for name, shape in FeatureMaps.shapes(attention, self.hidden, self.features).items():
            found, wanted = getattr(self.maps, name), (spec.layers, *shape)
            if found is None or found.shape != wanted:
                raise BadInput(
                    f"less was trained for another model: {name} has shape {getattr(found, 'shape', None)}; "
                    f"allowed: {wanted}"
                )

    def initial(self, key: Key[Array, ""], attention: AttentionSpec) -> FeatureMaps:
        """One layer's maps before training."""
        return FeatureMaps.random(key, attention, self.hidden, self.features)

    def settle(
        self,
        tokens: Tokens,
        kept: Bool[Array, "B G T"],
        lost: Bool[Array, "B G T"],
        evidence: Evidence,
        context: Context,
    ) -> tuple[Tokens, FeatureState]:
        batch, heads, _, width = tokens.values.shape
        empty = FeatureState.empty(batch, heads, self.features, width)
        psi = self.maps.at(context.layer).psi(tokens.rotated_keys)
        return tokens, empty.add(psi, tokens.values, lost)

    def step(
        self,
        store: Any,
        state: FeatureState,
        scores: Float[Array, "B G C"],
        excess: Int[Array, "B G"],
        most: int,
        context: Context,
    ) -> tuple[Any, FeatureState]:
        before = store.tokens()
        store = store.release(scores, excess, most)
        gone = before.present & (store.positions() < 0)
        # A store of packed groups frees a whole one, whatever the excess.
        left = replace(before, stats={}).select(gone, max(most, getattr(store, "unit", 1)))
        psi = self.maps.at(context.layer).psi(left.rotated_keys)
        return store, state.add(psi, left.values, left.present)

    def recall(self, state: FeatureState, query: Query, context: Context) -> Partial:
        return state.read(self.maps.at(context.layer).phi(query.rotated))
