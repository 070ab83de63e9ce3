"""Layers and moments of tiny random models, for tests of conversions."""

from functools import cache

import numpy as np

from kvx.models.build import random_model
from kvx.train.convert.moments import Moments, measure_moments
from kvx.train.convert.source import Source, read_source
from tests.models.tiny_configs import CONFIGS

SMALL = {"num_hidden_layers": 2}


@cache
def model(name: str = "llama2", **changes):
    """A tiny model of two layers."""
    return random_model({**CONFIGS[name], **SMALL, **changes}, seed=3)


def texts(rows: int = 4, length: int = 32, seed: int = 0) -> np.ndarray:
    """Random token ids."""
    return np.random.default_rng(seed).integers(0, 256, (rows, length)).astype(np.int32)


@cache
def moments(name: str = "llama2", **changes) -> tuple[Moments, ...]:
    """Of all layers, over enough tokens that every direction of the inputs is seen."""
    return measure_moments(model(name, **changes), [texts()])


def source(name: str = "llama2", layer: int = 1) -> Source:
    """One layer's attention."""
    return read_source(model(name), layer)


def inputs(name: str = "llama2", count: int = 10, seed: int = 1) -> np.ndarray:
    """Random normed inputs with their channel of ones."""
    width = CONFIGS[name]["hidden_size"]
    x = np.random.default_rng(seed).standard_normal((count, width))
    return np.concatenate([x, np.ones((count, 1))], axis=1)


def any_moments(source: Source, seed: int = 2) -> Moments:
    """Positive, otherwise arbitrary: for what has to hold whatever text was looked at."""
    random = np.random.default_rng(seed)
    width, pairs = source.key.shape[-1], source.head_dim // 2
    root = random.standard_normal((width, width))
    shares = random.random((source.heads, 16))
    return Moments(
        root @ root.T,
        root.T @ root,
        random.random((source.heads, pairs)),
        random.random((source.kv_heads, pairs)),
        shares / shares.sum(axis=1, keepdims=True),
    )
