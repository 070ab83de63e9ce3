"""Training one layer's feature maps: the parallel form of LESS, its loss, and the optimiser's loop."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from kvx.kernels.merge_partials import Partial, merge_partials
from kvx.parts.feature_state import FeatureMaps
from kvx.query import to_heads
from kvx.train.layer_record import LayerRecord


@dataclass(frozen=True)
class Settings:
    """How the maps of every layer are trained (LESS, Dong et al. 2024, section 4: Adam, 1e-3, halved every quarter).

    Attributes:
        steps: of the optimiser, for each layer.
        batch: texts of a step.
        rows: rows of each of them, drawn anew at every step; the paper takes all.
        rate: of Adam at first; halved after each quarter of the steps.
        dropout: share of hidden units that a step leaves out.
        checks: how often the held-back texts are looked at; the best maps win.
        seed: of the maps' first values, the rows and the dropout.
    """

    steps: int = 1000
    batch: int = 2
    rows: int = 128
    rate: float = 1e-3
    dropout: float = 0.3
    checks: int = 10
    seed: int = 0


def attention(
    maps: FeatureMaps,
    record: LayerRecord,
    drop_queries: Callable[[Array], Array] = lambda hidden: hidden,
    drop_keys: Callable[[Array], Array] = lambda hidden: hidden,
) -> Float[Array, "B G R N V"]:
    """The parallel form: held tokens weigh exp(l), lost ones phi . psi, under one normaliser."""
    products = jnp.einsum("bgrnm,bgtm->bgrnt", maps.phi(record.queries, drop_queries), maps.psi(record.keys, drop_keys))
    weights = jnp.where(record.lost[:, :, None], products, 0.0)
    mass = jnp.sum(weights, axis=-1)
    some = mass > jnp.finfo(jnp.float32).tiny
    divisor = jnp.where(some, mass, 1.0)
    out = jnp.einsum("bgrnt,bgtv->bgrnv", weights, record.values.astype(jnp.float32)) / divisor[..., None]
    return merge_partials(record.sparse, Partial(out, jnp.where(some, jnp.log(divisor), -jnp.inf))).out


def error(out: Float[Array, "B G R N V"], record: LayerRecord, kernel: Float[Array, "I E"]) -> Float[Array, ""]:
    """Mean squared difference from full attention, after the output matrix."""
    heads = to_heads(out - record.full)
    return jnp.mean(jnp.square(heads.reshape(*heads.shape[:2], -1) @ kernel.astype(jnp.float32)))


def train_layer(
    record: LayerRecord, kernel: Float[Array, "I E"], start: FeatureMaps, key: Key[Array, ""], settings: Settings
) -> tuple[FeatureMaps, float]:
    """One layer's maps, and the error they leave, as a share of the sparse policy's, both on held-back texts.

    The last tenth of the texts, at least one, is held back unless there is only one. 1.0 is what maps that say nothing
    leave; they are what a layer keeps that training does not help.

    Args:
        kernel: the layer's output matrix, by which errors are weighed.
        start: the maps before training.
    """
    texts, rows = record.queries.shape[0], record.queries.shape[3]
    held_back = 0 if texts == 1 else max(1, texts // 10)
    everything = jnp.arange(rows)
    judged = record.sample(jnp.arange(texts - held_back if held_back else 0, texts), everything)
    taught = record if not held_back else record.sample(jnp.arange(texts - held_back), everything)
    unit = error(record.sparse.out, record, kernel)
    unit = jnp.maximum(unit, jnp.finfo(jnp.float32).tiny)
    sparse = error(judged.sparse.out, judged, kernel)
    optimiser = _optimiser(settings)
    state, best, least = (start, optimiser.init(start)), start, 1.0  # type: ignore[arg-type]
    bounds = [settings.steps * check // settings.checks for check in range(settings.checks + 1)]
    for begin, end in pairwise(bounds):
        if begin == end:
            continue
        state = _steps(state, taught, kernel, unit, key, jnp.int32(begin), settings=settings, count=end - begin)
        left = float(_left(state[0], judged, kernel, sparse))
        if left < least:
            best, least = state[0], left
    return best, least


def _optimiser(settings: Settings) -> optax.GradientTransformation:
    quarter = max(settings.steps // 4, 1)
    return optax.adam(optax.exponential_decay(settings.rate, quarter, 0.5, staircase=True))


@jax.jit
def _left(maps: FeatureMaps, record: LayerRecord, kernel: Array, sparse: Array) -> Float[Array, ""]:
    return error(attention(maps, record), record, kernel) / jnp.maximum(sparse, jnp.finfo(jnp.float32).tiny)


@partial(jax.jit, static_argnames=("settings", "count"))
def _steps(
    state: tuple[FeatureMaps, Any],
    record: LayerRecord,
    kernel: Float[Array, "I E"],
    unit: Float[Array, ""],
    key: Key[Array, ""],
    begin: Int[Array, ""],
    *,
    settings: Settings,
    count: int,
) -> tuple[FeatureMaps, Any]:
    """`count` steps of the optimiser, as one program."""
    optimiser = _optimiser(settings)
    texts, rows = record.queries.shape[0], record.queries.shape[3]
    batch, some = min(settings.batch, texts), min(settings.rows, rows)

    def drop(key: Key[Array, ""]) -> Callable[[Array], Array]:
        def dropped(hidden: Array) -> Array:
            stays = jax.random.bernoulli(key, 1 - settings.dropout, hidden.shape)
            return jnp.where(stays, hidden / (1 - settings.dropout), 0.0)

        return dropped if settings.dropout else lambda hidden: hidden

    def loss(maps: FeatureMaps, sample: LayerRecord, queries: Key[Array, ""], keys: Key[Array, ""]) -> Array:
        # In units of the sparse policy's error: Adam does not mind the scale, but for its epsilon.
        return error(attention(maps, sample, drop(queries), drop(keys)), sample, kernel) / unit

    def step(state: Any, index: Int[Array, ""]) -> tuple[Any, None]:
        maps, inner = state
        which, where, *chances = jax.random.split(jax.random.fold_in(key, index), 4)
        chosen = jax.random.choice(which, texts, (batch,), replace=False)
        sample = record.sample(chosen, jax.random.choice(where, rows, (some,), replace=False))
        changes, inner = optimiser.update(jax.grad(loss)(maps, sample, *chances), inner)
        return (optax.apply_updates(maps, changes), inner), None

    return jax.lax.scan(step, state, begin + jnp.arange(count))[0]
