"""Donation of caches: a program takes over a cache's own arrays, and only reads what the cache shares with others."""

import functools
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import jax


def takes_cache(*, static: tuple[str, ...] = (), donated: tuple[str, ...] = ()) -> Callable[[Callable], Any]:
    """Compile a function that feeds the cache among its arguments, named `cache`, and returns it anew.

    The cache is donated, except its parts that are `lent` (a class attribute): levels of a fork, which belong to the
    cache it came from too. They go in as they are and come out the very arrays they were, so that nothing is copied and
    nobody's cache is taken away.

    Args:
        static: names of static arguments.
        donated: names of other arguments that are donated.
    """

    def compiled(function: Callable) -> Any:
        signature = inspect.signature(function)

        @partial(jax.jit, donate_argnames=("own", "taken"), static_argnames=("form", "options"))
        def run(own, lent, taken, rest, form, options):
            cache = jax.tree.unflatten(form, [mine if mine is not None else its for mine, its in zip(own, lent)])
            result = function(cache=cache, **taken, **rest, **dict(options))
            # What comes out of a loop is not known to be what went in; what went in is handed through uncopied.
            again = iter(part for part in lent if part is not None)
            return jax.tree.map(lambda node: next(again) if _lent(node) else node, result, is_leaf=_lent)

        @functools.wraps(function)
        def feeding(*arguments, **named):
            given = signature.bind(*arguments, **named).arguments
            parts, form = jax.tree.flatten(given.pop("cache"), is_leaf=_lent)
            own = [None if _lent(part) else part for part in parts]
            lent = [part if _lent(part) else None for part in parts]
            options = tuple((name, given.pop(name)) for name in static)
            taken = {name: given.pop(name) for name in donated}
            return run(own, lent, taken, dict(given), form, options)

        feeding._cache_size = run._cache_size
        return feeding

    return compiled


def _lent(node: Any) -> bool:
    return getattr(type(node), "lent", False)
