"""The policies that the contract tests run over: every registered method, and the chains that the spine promises.

A new policy joins by a row here; a test fails until it has one. A row names what the method cannot promise, with the
reason, instead of the tests branching on names.
"""

from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvx.chain import chain
from kvx.kinds import PUNCTUATION, SPECIAL
from kvx.parts.feature_state import FeatureMaps
from kvx.policies import (
    adakv,
    ape,
    cake,
    cam,
    d2o,
    fastgen,
    full,
    h2o,
    hashevict,
    kivi,
    knorm,
    less,
    mikv,
    minicache,
    paged,
    pyramidinfer,
    pyramidkv,
    q_filters,
    quantspec,
    quest,
    razor_attention,
    roco,
    shadowkv,
    snapkv,
    streaming_llm,
    tidaldecode,
    tova,
)
from kvx.policy import Policy


@dataclass(frozen=True)
class Case:
    """One policy at any budget.

    Attributes:
        build: from a budget in slots or a share; stores without a budget ignore it.
        lossless: the same with every code exact (bits=None); None: it has no codes.
        evicts: tokens leave, so that the budget bounds what is kept.
        chunked: it can be cut after every prefill chunk.
        reads: how often a step reads the same array: more than once where layers share it.
    """

    build: Callable[[int | float], Policy]
    lossless: Callable[[int | float], Policy] | None = None
    evicts: bool = True
    chunked: bool = True
    reads: int = 1

    @property
    def exact(self) -> Callable[[int | float], Policy]:
        """The policy without rounding: what the identity contract is about."""
        return self.lossless or self.build


def _q_filters(budget: int | float) -> Policy:
    """Q-Filters as calibration leaves it, with random directions for the tiny model's layers, KV heads and head dim."""
    blank = q_filters(budget, window=8)
    (stage,) = blank.stages
    directions = jax.random.normal(jax.random.key(7), (3, 2, 32), jnp.float32)
    return replace(blank, stages=(replace(stage, score=replace(stage.score, directions=directions)),))


def _pyramidinfer(budget: int | float) -> Policy:
    """Prompts are never cut below `budget` tokens; blocks of generated ones are short, so that some leave."""
    share = 1.0 if budget >= 80 else 0.5
    return pyramidinfer(rate=0.5, recent=0.1, least=int(budget), block=4, share=share, last=share)


def _shadowkv(budget: int | float) -> Policy:
    return shadowkv(budget, rank=16, chunk=4, outliers=2, local=1)


def _fastgen(budget: int | float) -> Policy:
    """FastGen, told of some kinds among the tiny model's 97 ids."""
    kinds = np.zeros(97, np.int8)
    kinds[:3], kinds[3:15] = SPECIAL, PUNCTUATION
    return fastgen(0.7 if budget < 64 else 1.0, shortest=30).with_kinds(kinds)


def less_with_maps(budget: int | float, layers: int = 3) -> Policy:
    """LESS with random maps for the tiny model's layers and heads, of scales at which the state has weight."""
    blank = less(budget, features=4, hidden=8)
    (stage,) = blank.stages
    sizes = ((4, 32, 8), (4, 8, 4), (2, 32, 8), (2, 8, 4), (2, 4, 4), (2, 4), (2, 4))
    maps = [0.3 * jax.random.normal(jax.random.key(index), (layers, *size)) for index, size in enumerate(sizes)]
    return replace(blank, stages=(replace(stage, losers=replace(stage.losers, maps=FeatureMaps(*maps))),))


def _kivi() -> Policy:
    return kivi(bits=4, group=16, residual=16)


CASES: dict[str, Case] = {
    "full": Case(lambda budget: full(), evicts=False),
    "streaming_llm": Case(streaming_llm),
    "streaming_llm at true positions": Case(lambda budget: streaming_llm(budget, renumber=False)),
    "h2o": Case(h2o),
    "snapkv": Case(lambda budget: snapkv(budget, window=8)),
    "tova": Case(tova),
    "knorm": Case(knorm),
    # It has no budget: what is kept follows the prompt's length.
    "pyramidinfer": Case(_pyramidinfer, evicts=False),
    "pyramidkv": Case(lambda budget: pyramidkv(budget, window=8, beta=4)),
    "adakv": Case(lambda budget: adakv(budget, window=8)),
    "adakv over h2o": Case(lambda budget: adakv(budget, window=8, score="h2o")),
    "q_filters": Case(_q_filters),
    # Its size follows from what a prompt's attention needs, not from a budget; "everything" is a recovery of 1. It is
    # profiled on the whole prompt, so a chunk cannot be cut by itself.
    "fastgen": Case(_fastgen, evicts=False, chunked=False),
    # It cuts earlier layers when later ones arrive, so a chunk cannot be cut by itself.
    "cake": Case(lambda budget: cake(budget, window=8), chunked=False),
    # Of prompts without labels, so all prefix: the full cache; contexts are its own test's.
    "ape": Case(lambda budget: ape(), evicts=False),
    "quest": Case(lambda budget: quest(budget, page=8, skip=(0,)), evicts=False),
    # Its retrieval heads keep everything, and the mean tokens of the others have to see every token leave.
    "razor_attention": Case(
        lambda budget: razor_attention(int(budget) - 5, heads=((0, 1), (2, 0), (2, 1))), evicts=False, chunked=False
    ),
    # In slots only: a buffer is a number of tokens.
    "razor_attention without retrieval heads": Case(
        lambda budget: razor_attention(int(budget) - 5, ratio=None, heads=()), evicts=False, chunked=False
    ),
    "tidaldecode": Case(lambda budget: tidaldecode(budget, layers=(0,)), evicts=False),
    "tidaldecode one choice a KV head": Case(
        lambda budget: tidaldecode(budget, layers=(0, 1), group="mean"), evicts=False
    ),
    "shadowkv": Case(_shadowkv, evicts=False),
    "paged": Case(lambda budget: paged(), evicts=False),
    "snapkv+paged": Case(lambda budget: chain(snapkv(budget, window=8), paged(8))),
    # Its first layer is exempt, so the budget says nothing about it; it decides when all layers are known.
    "d2o": Case(lambda budget: d2o(budget, skip=(0,)), evicts=False, chunked=False),
    "roco": Case(roco),
    "roco after the prompt": Case(lambda budget: roco(budget, mode="encoding")),
    # The budget counts generated tokens only, and the whole prompt stays.
    "roco beside the prompt": Case(lambda budget: roco(budget, mode="decoding"), evicts=False),
    "cam": Case(lambda budget: cam(budget, width=8)),
    "cam at places in the cache": Case(lambda budget: cam(budget, width=8, renumber=True)),
    "cam over h2o": Case(lambda budget: cam(budget, host="h2o", width=8)),
    # Up to three tokens more than its budget wait until four leave together.
    "cam every four steps": Case(lambda budget: cam(budget, width=8, every=4), evicts=False),
    # Its state has to see every token leave, so a chunk cannot be cut by itself.
    "less": Case(less_with_maps, chunked=False),
    "hashevict": Case(hashevict),
    "kivi": Case(lambda budget: _kivi(), lambda budget: kivi(bits=None), evicts=False),
    "mikv": Case(lambda budget: mikv(high=budget, bits=4), lambda budget: mikv(high=budget, bits=None), evicts=False),
    # Two layers share directions. No budget says how many: the identity keeps every pair of vectors apart.
    "minicache": Case(
        lambda budget: minicache(start=0.34),
        lambda budget: minicache(start=0.34, gamma=None),
        evicts=False,
        reads=2,
    ),
    "snapkv+kivi": Case(
        lambda budget: chain(snapkv(budget, window=8), _kivi()),
        lambda budget: chain(snapkv(budget, window=8), kivi(bits=None)),
    ),
    "pyramidkv+kivi": Case(
        lambda budget: chain(pyramidkv(budget, window=8, beta=4), _kivi()),
        lambda budget: chain(pyramidkv(budget, window=8, beta=4), kivi(bits=None)),
    ),
    # Whole groups of keys leave, so that it holds up to a group and a tail more than its budget.
    "h2o+kivi": Case(
        lambda budget: chain(h2o(budget), _kivi()), lambda budget: chain(h2o(budget), kivi(bits=None)), evicts=False
    ),
    "quantspec": Case(lambda budget: quantspec(group=16), lambda budget: quantspec(bits=None, group=16), evicts=False),
    "snapkv+quantspec": Case(
        # In groups of four the double buffer, which is exact, does not outweigh what the codes save of few tokens.
        lambda budget: chain(snapkv(budget, window=8), quantspec(group=4, gamma=3)),
        lambda budget: chain(snapkv(budget, window=8), quantspec(bits=None)),
    ),
    "snapkv+quest": Case(lambda budget: chain(snapkv(budget, window=8), quest(budget, page=8, skip=(0,)))),
    # Factors and landmarks of the few tokens that are left take more than their keys did.
    "snapkv+shadowkv": Case(
        lambda budget: chain(snapkv(budget, window=8), _shadowkv(16)),
        lambda budget: chain(snapkv(budget, window=8), _shadowkv(4096)),
        evicts=False,
    ),
    "snapkv+mikv": Case(
        lambda budget: chain(snapkv(budget, window=8), mikv(high=0.5, bits=4)),
        lambda budget: chain(snapkv(budget, window=8), mikv(high=0.5, bits=None)),
    ),
    "h2o+quest": Case(lambda budget: chain(h2o(budget), quest(budget, page=8, skip=(0,)))),
}

LATENT = {"latent_codes"}
"""Methods for latent attention, which the tiny model here does not have: `test_latent_contracts.py` has their cases."""

KINDS = {"full", "streaming_llm", "h2o", "snapkv", "pyramidkv", "adakv", "kivi", "quest", "roco"}
"""One for each kind of store and schedule: `make test` checks the contracts on these, the slower tests on all."""


def parameters(chosen: Iterable[str] = CASES, quick: Container[str] = KINDS) -> list:
    """Names of cases, as a test's parameters."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in chosen]
