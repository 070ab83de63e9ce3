"""Stages: the steps of which a policy is made, each a frozen pytree with optional hooks.

Selection is a mask and never gathered tokens: that one choice lets rectangular, ragged, tiered and packed stores all
follow the same selections. A stage refines the mask (`keep`), or says how what is kept is stored (`pack`; the last
stage that answers wins), or acts at each decode step (`before`, `read`, `step`).
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Int8, Shaped

from kvx.context import Activations, Context, Layout, Spec
from kvx.decoder import AttentionSpec
from kvx.evidence import Evidence, Requests
from kvx.kernels.merge_partials import Partial
from kvx.query import Query
from kvx.stores.base import Store
from kvx.tokens import Tokens


class Stage:
    """One step of a policy. Every hook has a neutral default; a subclass overrides what it is about.

    Class attributes:
        bounded: the cache never grows past the budget, however long the generation (it acts while decoding).
        overflow: if bounded, tokens beyond its budget that a head may hold before it acts, the fresh one included.
        rotated: False if its store keeps keys unrotated.
        renumber: positions are assigned by place in the cache instead of by place in the text.
        decides: "layer" (inside the layer loop), "cascade" (inside it, and again whenever a later layer comes), or
            "end" (when the evidence of all layers is known).
        stores: it answers `pack`, so that nothing can follow it in a chain.
        learns: it has arrays or hyperparameters that `kvx.calibrate` fills.
        append_only: its store cannot free slots for reuse, so that nothing that evicts while decoding can precede it.
        measures: how many slots it needs is known only when the layer's evidence is (`need`).
        thins: tokens leave the residual stream after its layers (`thin`), so that no other policy can share the pass.
        recalls: its state (`recall`) or a tier of its store holds what became of tokens that left, so that it must see
            all of them leave.
        undoes: of a stage that stores: the most new tokens its store appends together and takes back (`crop`).
        values_apart: it codes, merges or moves values apart from keys, which latent attention does not have
            (`AttentionSpec.latent`).
        narrows: its store has a narrower view of the same arrays to draft with (`narrow`).
        aligned: its layers have to hold the same tokens in the same slots, so that nothing that selects can precede it.
        unchained: it relies on positions or slots that no other stage knows of, so that nothing can be chained with it.
        by_kind: it can use a table of what each token id is (`with_kinds`).
    """

    bounded: bool = False
    overflow: int = 1
    rotated: bool = True
    renumber: bool = False
    decides: str = "layer"
    stores: bool = False
    learns: bool = False
    append_only: bool = False
    measures: bool = False
    thins: bool = False
    recalls: bool = False
    aligned: bool = False
    unchained: bool = False
    values_apart: bool = False
    by_kind: bool = False
    undoes: int = 0
    narrows: bool = False

    @property
    def acts(self) -> bool:
        """Whether it does anything at a decode step; a stage with such a hook may know when it does not."""
        return any(overrides(self, hook) for hook in ("before", "read", "step"))

    @property
    def evicts(self) -> bool:
        """Whether it frees slots while decoding, so that its `capacity` limits a cache as long as there is room.

        A stage may do so and yet not be `bounded`: one whose budget grows with the text.
        """
        return self.bounded

    def at(self, layer: int, layers: int) -> "Stage | None":
        """This stage in one layer; None where it does not act."""
        return self

    def objection(self, layers: Mapping[int, AttentionSpec]) -> str | None:
        """Why it cannot serve a model, by the layers where it acts: what follows the policy's name; None: it can.

        Asked before any work.
        """
        latent = [layer for layer, attention in layers.items() if attention.latent]
        if not (self.values_apart and latent):
            return None
        return (
            f"treats values apart from keys, but in layer {latent[0]} they are channels of them (latent attention); "
            "allowed: policies that keep, drop or read whole tokens"
        )

    def observe(self, prefill: bool) -> Requests:
        """The evidence this stage reads, at prefill or at a decode step."""
        return Requests()

    def capacity(self, spec: Spec, layer: int) -> int | None:
        """The most tokens a row and head may keep, however many there are; None: no limit of its own.

        Called before any work: the place to refuse what cannot run on this model (BadInput).
        """
        return None

    def growth(self, spec: Spec, layer: int) -> int | None:
        """The most of the `spec.room` tokens to come that a row and head hold at a time; None: all of them."""
        return None

    def layout(self, labels: Int[Array, "B T"], lengths: Int[Array, "B"]) -> Layout | None:
        """Where the prompt's tokens stand and which see each other, by their labels; None: in order, all of them."""
        return None

    def stats(self, tokens: Tokens, evidence: Evidence | None, context: Context) -> dict[str, Shaped[Array, "B G T"]]:
        """What to keep with each token, given the evidence so far (None: a token just decoded, not yet attended)."""
        return {}

    def measure(self, tokens: Tokens, evidence: Evidence) -> Any:
        """For `decides = "end"`: what this layer contributes to the decision over all layers."""
        return None

    def plan(self, measures: list[Any], spec: Spec, lengths: Int[Array, "B"], ends: Int[Array, "B"]) -> list[Any]:
        """For `decides = "end"`: each layer's share of the decision, from every layer's measure.

        Args:
            ends: tokens that a row will hold at most: its prompt and what was asked for after it.
        """
        return [None] * len(measures)

    def ascend(self, carry: Any, tokens: Tokens, evidence: Evidence, context: Context) -> Any:
        """For `decides = "cascade"`: what the layers so far hold, once this layer's prompt is in (None: no layer yet).

        One jitted body for all layers: the carry keeps its shapes from the second layer on.
        """
        return carry

    def land(self, carry: Any, context: Context) -> tuple[Store, Any]:
        """For `decides = "cascade"`: one layer's store and state, from what all layers hold (here: the carry is it)."""
        return carry, None

    def need(self, tokens: Tokens, mask: Bool[Array, "B G T"], state: Any, context: Context) -> Int[Array, ""]:
        """For `measures`: slots per head that hold what this stage kept, and what will come."""
        return jnp.max(jnp.sum(mask, axis=-1)) + context.spec.room

    def remaining(self, spec: Spec, layer: int) -> int | None:
        """For `thins`: the most tokens of a row that go on to the next layer; None: all that came."""
        return None

    def thin(self, tokens: Tokens, evidence: Evidence, context: Context) -> Bool[Array, "B T"]:
        """For `thins`: which tokens go on to the next layer (those of a row's own, in any layer of `remaining`)."""
        return jnp.any(tokens.present, axis=1)

    def keep(
        self, tokens: Tokens, mask: Bool[Array, "B G T"], evidence: Evidence, context: Context
    ) -> tuple[Tokens, Bool[Array, "B G T"], Any]:
        """Refine the mask (and, when losers are merged, the tokens); the third value is this stage's state."""
        return tokens, mask, None

    def pack(
        self, tokens: Tokens, mask: Bool[Array, "B G T"], capacity: int, evidence: Evidence, context: Context
    ) -> Store | None:
        """The store that holds what is kept; None: no opinion."""
        return None

    def settle(self, store: Any) -> Any:
        """When every token held is there to stay: what rewrites its store without changing what is read."""
        return store

    def before(self, store: Any, state: Any, query: Query, context: Context) -> tuple[Any, Any]:
        """Before a fresh token is appended: free a slot for it by its query."""
        return store, state

    def read(self, store: Any, query: Query, carry: Any, context: Context) -> tuple[Partial, Any] | None:
        """Attention of a decode step, and what this layer hands up to the next ones of the same step.

        Args:
            carry: what the layers below handed up; None in the first.

        Returns:
            None: no opinion, the store reads as it does.
        """
        return None

    def recall(self, state: Any, query: Query, context: Context) -> Partial | None:
        """For `recalls`: attention over tokens that left the store, by what this stage's state holds of them.

        It joins the store's under one softmax; the evidence that a decode step collects is about the store alone.
        """
        return None

    def step(self, store: Any, state: Any, evidence: Evidence, context: Context) -> tuple[Any, Any]:
        """After a decode step has attended: update statistics, choose and free the next victim."""
        return store, state

    def with_kinds(self, table: Int8[Array, "N"]) -> "Stage":
        """For `by_kind`: with the kind of every token id (`kvx.kinds`)."""
        return self

    def probe(self, vocabulary: int, longest: int, seed: int) -> Int[np.ndarray, "T"] | None:
        """For `learns`: a text of its own to calibrate on, in place of the caller's; None: a sample of those.

        Args:
            vocabulary: number of token ids.
            longest: the most tokens it may have.
            seed: of anything random in it.
        """
        return None

    def digest(self, activations: Activations) -> Any:
        """For `learns`: what calibration keeps of one layer's activations; traced, layer by layer."""
        return None

    def calibrate(self, digests: list[Any]) -> "Stage":
        """With its learned arrays, or hyperparameters, filled from every layer's digest (`kvx.calibrate`)."""
        return self

    @property
    def learned(self) -> dict[str, Any]:
        """Hyperparameters that calibration filled, as the recipe's text writes them; arrays are not among them."""
        return {}


def overrides(stage: Stage, hook: str) -> bool:
    """Whether a stage has its own version of a hook."""
    return getattr(type(stage), hook) is not getattr(Stage, hook)
