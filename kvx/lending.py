"""Donation of caches: a program takes over a cache's own arrays, and only reads what the cache shares with others."""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax

from kvx.layer_by_layer import is_asked


def takes_cache(*, static: tuple[str, ...] = (), donated: tuple[str, ...] = ()) -> Callable[[Callable], Any]:
    """Compile a function that feeds the cache among its arguments, named `cache`, and returns it anew.

    The cache is donated (`takes`). Where decoding runs layer by layer, the function is not compiled but runs as it is.

    Args:
        static: names of static arguments.
        donated: names of other arguments that are donated.
    """

    def compiled(function: Callable) -> Any:
        program = takes("cache", static=static, donated=donated)(function)

        @functools.wraps(function)
        def feed(*arguments, **named):
            return (function if is_asked() else program)(*arguments, **named)

        feeding: Any = feed
        feeding._cache_size = program._cache_size
        return feeding

    return compiled


def takes(name: str, *, static: tuple[str, ...] = (), donated: tuple[str, ...] = ()) -> Callable[[Callable], Any]:
    """Compile a function that takes over a cache, or a part of one, and returns it anew.

    It is donated, except its parts that are `lent` (a class attribute; their arrays are in `store`): levels of a fork,
    which belong to the cache it came from too. Those go in beside it and do not come out again: the caller gets back
    the arrays it gave, so that nothing is copied and nobody's cache is taken away.

    Args:
        name: of the argument.
        static: names of static arguments.
        donated: names of other arguments that are donated.
    """

    def compiled(function: Callable) -> Any:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def inside(taken, lent, **others):
            return _hollow(function(**{name: _filled(taken, lent)}, **others))

        del inside.__wrapped__  # its parameters are not the function's
        run: Any = jax.jit(inside, donate_argnames=("taken", *donated), static_argnames=static)

        def feed(*arguments, **named):
            others = signature.bind(*arguments, **named).arguments
            taken = others.pop(name)
            lent = [part for part in jax.tree.leaves(taken, is_leaf=_lent) if _lent(part)]
            if not lent:
                return run(taken=taken, lent=lent, **others)
            return _filled(run(taken=_hollow(taken), lent=lent, **others), lent)

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
