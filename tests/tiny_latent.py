"""The small random Llama of the tests with latent attention in some or all of its layers."""

from functools import cache

import numpy as np

from kvx.models.build import random_model
from kvx.models.latent_layers import SECTION, LatentLayer, section
from kvx.models.mla import LatentConfig
from tests import tiny

PLAIN = {"heads": 4, "rank": 32, "rotary": 16, "content": 24, "value": 20, "scale": 40**-0.5}
"""Four heads as the tiny Llama has; widths all different, so that none can stand in for another."""

KINDS = {
    "one rotary key": PLAIN,
    "a rotary key for every two heads": PLAIN | {"blocks": 2},
    "a rotary key for every head": PLAIN | {"blocks": 4},
    "norms and a query rank": PLAIN | {"query_rank": 12, "query_norm": True, "latent_norm": True},
    "query rank without norms": PLAIN | {"query_rank": 12},
    "biases": PLAIN | {"blocks": 2, "bias": True, "out_bias": True},
    "no rotary key": PLAIN | {"rotary": 0},
    "no content": PLAIN | {"content": 0},
}


def layer(kind: str = "one rotary key", **changes) -> LatentLayer:
    """A latent layer with frequencies that no rule gives."""
    config = LatentConfig(**(KINDS[kind] | changes))
    return LatentLayer(config, np.geomspace(1, 0.01, config.rotary // 2).astype(np.float32))


@cache
def model(kind: str = "one rotary key", latent: tuple[int, ...] = (0, 1, 2), **changes):
    """Three layers, of which those in `latent` have latent attention; the same model for every test."""
    described = section({index: layer(kind) for index in latent})
    return random_model({**tiny.CONFIG, "num_hidden_layers": 3, SECTION: described, **changes}, seed=0)
