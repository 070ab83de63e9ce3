"""Claims about what is alive: sums worked out by hand, and what lives in earnest between a prefill's programs."""

import gc
import importlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import kvx
from kvx.eval.cost.live_bytes import Scratch, most_alive
from kvx.eval.plan.abstract import abstract_prefill
from tests import tiny

KIB = 1024
X = jax.ShapeDtypeStruct((256,), jnp.float32)
"""One KiB."""


@jax.jit
def double(x):
    return jnp.concatenate([x, x])


@jax.jit
def total(x):
    return jnp.sum(x, keepdims=True)


@partial(jax.jit, donate_argnums=0)
def add(x, y):
    return x + y


def test_an_array_lives_until_it_is_read_for_the_last_time():
    def run(x):
        two = double(x)  # 2 KiB
        four = double(two)  # 4 more beside them: 6
        eight = double(four)  # 8 beside 4: 12, since `two` is gone
        return total(eight)

    assert most_alive(jax.make_jaxpr(run)(X)) == 12 * KIB


def test_an_array_that_is_needed_again_stays():
    def run(x):
        two = double(x)
        four = double(two)
        eight = double(four)
        return total(eight) + total(two)

    assert most_alive(jax.make_jaxpr(run)(X)) == 14 * KIB


def test_what_is_given_is_not_counted_and_what_is_returned_stays():
    assert most_alive(jax.make_jaxpr(lambda x: x)(X)) == 0
    # Both results stay, so the second is made beside the first.
    assert most_alive(jax.make_jaxpr(lambda x: (double(x), double(x)))(X)) == 4 * KIB


def test_a_donated_array_makes_room_for_the_result():
    def run(x, plus):
        return plus(double(x), double(x))

    donating = jax.make_jaxpr(partial(run, plus=add))(X)
    keeping = jax.make_jaxpr(partial(run, plus=jax.jit(lambda x, y: x + y)))(X)
    assert most_alive(donating) == 4 * KIB and most_alive(keeping) == 6 * KIB


def test_scratch_is_added_to_its_call_and_each_program_is_compiled_once():
    def run(x):
        return double(double(x))

    trace = jax.make_jaxpr(run)(X)
    assert most_alive(trace, scratch=lambda call: KIB) == 7 * KIB

    @jax.jit
    def product(x):
        # The square in the middle exists nowhere but in the program's scratch.
        return jnp.sort(jnp.outer(x, x), axis=0)[0]

    scratch = Scratch()
    found = most_alive(jax.make_jaxpr(lambda x: product(product(x)))(X), scratch=scratch)
    assert len(scratch.known) == 1 and found >= 256 * KIB


def test_between_the_programs_of_a_prefill_as_much_is_alive_as_the_trace_says(monkeypatch):
    model, policy = tiny.model(), kvx.parse_policy("snapkv(budget=64, window=8)")
    tokens, _ = tiny.prompts(256, 256)
    told = most_alive(abstract_prefill(model, policy, 256, 2, 128).trace)
    kvx.prefill(model, tokens, policy)  # what is made once and kept is there already
    gc.collect()
    before, seen = _alive(), []

    def watched(program):
        def run(*arguments, **named):
            found = program(*arguments, **named)
            seen.append(_alive() - before)
            return found

        return run

    # The package has functions of some of these names, which an import would give.
    for module, name in (("kvx.prefill", "attend"), ("kvx.cache_builder", "pack_layer")):
        home = importlib.import_module(module)
        monkeypatch.setattr(home, name, watched(getattr(home, name)))
    kvx.prefill(model, tokens, policy, max_new_tokens=128)
    # Python holds the residual stream of the layer below, and a few counters, a little longer than they are read.
    assert len(seen) == 2 * len(model.blocks) and told <= max(seen) <= 1.25 * told


def _alive() -> int:
    return sum(np.dtype(each.dtype).itemsize * each.size for each in jax.live_arrays())
