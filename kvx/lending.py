"""Donation of caches: a program takes over a cache's own arrays, and only reads what the cache shares with others."""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax


def takes_cache(*, static: tuple[str, ...] = (), donated: tuple[str, ...] = ()) -> Callable[[Callable], Any]:
    """Compile a function that feeds the cache among its arguments, named `cache`, and returns it anew.

    The cache is donated, except its parts that are `lent` (a class attribute; their arrays are in `store`): levels of a
    fork, which belong to the cache it came from too. Those go in beside it and do not come out again: the caller gets
    back the arrays it gave, so that nothing is copied and nobody's cache is taken away.

    Args:
        static: names of static arguments.
        donated: names of other arguments that are donated.
    """

    def compiled(function: Callable) -> Any:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def inside(cache, lent, **others):
            return _hollow(function(cache=_filled(cache, lent), **others))

        del inside.__wrapped__  # its parameters are not the function's
        run: Any = jax.jit(inside, donate_argnames=("cache", *donated), static_argnames=static)

        def feed(*arguments, **named):
            others = signature.bind(*arguments, **named).arguments
            cache = others.pop("cache")
            lent = [part for part in jax.tree.leaves(cache, is_leaf=_lent) if _lent(part)]
            return _filled(run(cache=_hollow(cache), lent=lent, **others), lent)

        feeding: Any = functools.wraps(function)(feed)
        feeding._cache_size = run._cache_size
        return feeding

    return compiled


def _lent(node: Any) -> bool:
    return getattr(type(node), "lent", False)


def _hollow(tree: Any) -> Any:
    """Without the arrays of its lent parts."""
    return jax.tree.map(lambda node: replace(node, store=None) if _lent(node) else node, tree, is_leaf=_lent)


def _filled(tree: Any, lent: Sequence[Any]) -> Any:
    """With these as its lent parts, in the order of the tree."""
    parts = iter(lent)
    return jax.tree.map(lambda node: next(parts) if _lent(node) else node, tree, is_leaf=_lent)
