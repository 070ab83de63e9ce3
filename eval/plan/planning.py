"""A plan: bytes, limits and times of a model under some policies on some chips, from shapes and peaks alone."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jax.typing import DTypeLike

from kvx.buckets import bucket, edges
from kvx.errors import BadInput
from kvx.eval.cost.cache_bytes import CacheBytes
from kvx.eval.cost.live_bytes import most_alive
from kvx.eval.plan.abstract import AbstractPrefill, Split, abstract_prefill, grown, shapes
from kvx.eval.plan.arithmetic import prompt_operations, token_operations
from kvx.eval.plan.roofline import (
    Load,
    Machine,
    fits,
    prefill_seconds,
    session_rate,
    step_seconds,
    switch_seconds,
    users,
)
from kvx.generate import full_policy
from kvx.models.build import abstract_model
from kvx.parts.amounts import whole
from kvx.policy import Policy
from kvx.train.shapes import model_config

CONTEXT = 32768
"""Tokens of a prompt, if nothing else is said and the model has as many."""


@dataclass(frozen=True)
class Job:
    """What is planned for.

    Attributes:
        model: a zoo name, a Hugging Face directory, a .gguf file, or a config.json of any name.
        machine: chips.
        context: tokens S of every prompt; None: `CONTEXT`, or as many as the model's positions leave room for.
        batch: rows u.
        answer: tokens a of an answer.
        rounds: answers R that a user gets; a cache has room for all of them.
        users: V; None: as many as rows.
        dtype: of weights and of keys and values.
    """

    model: str
    machine: Machine
    context: int | None = None
    batch: int = 1
    answer: int = 128
    rounds: int = 1
    users: int | None = None
    dtype: DTypeLike = "bfloat16"

    def __post_init__(self) -> None:
        for name in ("batch", "answer", "rounds"):
            whole(getattr(self, name), name, least=1)
        whole(self.machine.chips, "chips", least=1)
        if self.users is not None:
            whole(self.users, "users", least=1)

    @property
    def room(self) -> int:
        """Tokens to come after a prompt."""
        return self.answer * self.rounds


@dataclass(frozen=True)
class Plan:
    """What one policy comes to. Sizes in bytes, times in seconds.

    Attributes:
        policy: its text.
        cache, metadata, host: of the whole batch, wherever it lies; of them, what is neither keys nor values nor codes,
            and what lies in host memory.
        share: of the full cache's bytes.
        read: of the whole batch's cache, that a decode step reads; None: only the data say, and times take all of it.
        weights, resident, peak: on one chip, tiles included where memory has them: parameters (and what the policy
            learned), the cache beside them, and the largest sum while the prompts are read and packed; the scratch
            within compiled programs is not in it (`kvx.eval.plan.check` asks the compiler).
        largest_batch: rows of `context` tokens whose caches fit beside the weights.
        largest_context: tokens of a prompt, in the steps that prompts are padded to, at which the batch's cache fits.
        limited: whether it is the model's positions that end there.
        prefill_seconds, step_seconds: of the whole batch.
        tokens_per_second: of all its rows.
        switch_seconds: one user's cache out and another's in.
        sessions_per_hour: users who each bring a prompt and get their answers.
        fits: whether the batch's cache fits, and whether its prefill does, as far as `peak` tells.
        bound: the cache is the largest that any data may need; the data decide.
    """

    policy: str
    cache: int
    metadata: int
    host: int
    share: float
    read: int | None
    weights: int
    resident: int
    peak: int
    largest_batch: int
    largest_context: int
    limited: bool
    prefill_seconds: float
    step_seconds: float
    tokens_per_second: float
    switch_seconds: float
    sessions_per_hour: float
    fits: bool
    prefill_fits: bool
    bound: bool


class Planner:
    """Makes the plans of a job; one model's shapes serve them all."""

    def __init__(self, job: Job):
        """Find the model's shapes.

        Raises:
            BadInput: a model that cannot be found, or that kvx does not compute; more positions than it has.
        """
        self.job = job
        config = model_config(job.model, job.model) if job.model.endswith(".json") else model_config(job.model)
        if not isinstance(config, dict):
            raise BadInput(f"model={job.model!r} holds no JSON object; allowed: a config.json")
        self.model: Any = shapes(abstract_model(config, job.dtype))
        chip = job.machine.chip
        self.split = Split(job.machine.chips, tiled=bool(chip.topologies))
        self.kv_heads = self.model.blocks[0].spec.kv_heads
        self.context = whole(min(CONTEXT, self.longest) if job.context is None else job.context, "context", 1)
        if self.context > self.longest:
            raise BadInput(
                f"context={self.context}; allowed: 1 to {self.longest}, the {self.model.max_positions} positions of "
                f"{job.model!r} less room for {job.rounds} x {job.answer} tokens of answers"
            )
        self.job = replace(job, context=self.context)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt that the model's positions leave room for."""
        return self.model.max_positions - bucket(self.job.room)

    def plans(self, policies: Sequence[Policy]) -> Iterator[Plan]:
        """A plan for each policy.

        Raises:
            BadInput: a policy that cannot serve the model; more positions than it has.
        """
        full = CacheBytes.of(self.prefill(full_policy(), self.context, self.job.batch).cache).total
        # All of them first: what one of them cannot do is said before the others' figures.
        prefills = [self.prefill(policy, self.context, self.job.batch) for policy in policies]
        for policy, prefill in zip(policies, prefills, strict=True):
            yield self._plan(policy, prefill, full)

    def prefill(self, policy: Policy, context: int, rows: int) -> AbstractPrefill:
        """The job's prefill with another context or batch."""
        return abstract_prefill(self.model, policy, context, rows, self.job.room)

    def load(self, policy: Policy, context: int) -> Load:
        """What the policy asks of the machine."""
        one, two = (self.prefill(policy, context, rows) for rows in (1, 2))
        pairs = zip(one.cache, two.cache, strict=True)
        alike = Counter((first._replace(path=()), second._replace(path=())) for first, second in pairs)

        def cache(rows: int) -> int:
            sizes = {
                pair: self.split.part(grown(*pair, rows), rows, self.kv_heads) for pair in alike if not pair[0].host
            }
            return sum(alike[pair] * size for pair, size in sizes.items())

        weights = self.split.parameters(self.model) + policy.nbytes
        looked_up = 0 if self.model.head is None else self.split.parameters(self.model.embedding)
        return Load(
            weights=weights,
            weights_read=weights - looked_up,
            cache=cache,
            reads=1.0 if two.read is None else two.read / CacheBytes.of(two.cache).total,
            user=replace(self.split, tiled=False).cache(one.cache, 1, self.kv_heads).device,
            prompt=prompt_operations(self.model, policy, context, bucket(context)),
            step=token_operations(self.model),
        )

    def _plan(self, policy: Policy, prefill: AbstractPrefill, full: int) -> Plan:
        job, machine = self.job, self.job.machine
        load = self.load(policy, self.context)
        whole_cache = CacheBytes.of(prefill.cache)
        alive = most_alive(prefill.trace, lambda aval: self.split.array(aval, job.batch, self.kv_heads))
        peak = load.weights + alive
        step = step_seconds(load, machine, job.batch)
        longest, limited = self.largest_context(policy, load.weights)
        return Plan(
            policy=policy.text,
            cache=whole_cache.total,
            metadata=whole_cache.metadata,
            host=whole_cache.host,
            share=whole_cache.total / full,
            read=prefill.read,
            weights=load.weights,
            resident=load.cache(job.batch),
            peak=peak,
            largest_batch=users(load, machine),
            largest_context=longest,
            limited=limited,
            prefill_seconds=prefill_seconds(load, machine, job.batch),
            step_seconds=step,
            tokens_per_second=job.batch / step,
            switch_seconds=switch_seconds(load, machine),
            sessions_per_hour=3600 * session_rate(load, machine, job.users or job.batch, job.rounds, job.answer),
            fits=fits(load, machine, job.batch),
            prefill_fits=peak <= machine.chip.memory,
            bound=prefill.bound,
        )

    def largest_context(self, policy: Policy, weights: int) -> tuple[int, bool]:
        """The longest prompt at which the batch's cache fits, by halving; and whether it is the model's own limit."""
        job, most = self.job, self.longest
        lengths = [most]
        for edge in edges():
            if edge >= most:
                break
            lengths.insert(-1, edge)

        def fitting(length: int) -> bool:
            cache = self.prefill(policy, length, job.batch).cache
            held = weights + self.split.cache(cache, job.batch, self.kv_heads).device
            return held <= job.machine.chip.memory

        low, high = -1, len(lengths)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fitting(lengths[middle]) else (low, middle)
        return (0, False) if low < 0 else (lengths[low], low == len(lengths) - 1)
