"""The registry of named methods: recipes register themselves and are called by name."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from kvx.errors import BadInput, unknown
from kvx.policy import Policy

_RECIPES: dict[str, Callable[..., Policy]] = {}


def recipe(build: Callable[..., Policy]) -> Callable[..., Policy]:
    """Register a function that builds a policy; its name is the method's, its parameters the hyperparameters.

    The policy it returns is labelled with the call that makes it again, e.g. "snapkv(budget=256)".
    """
    # Recipes check their own parameters, in a sentence; a session's run-time type checker must not get there first.
    build = inspect.unwrap(build)
    signature = inspect.signature(build)

    @functools.wraps(build)
    def checked(*arguments: Any, **parameters: Any) -> Policy:
        for name in parameters:
            if name not in signature.parameters:
                raise unknown(f"parameter of {build.__name__}", name, signature.parameters)
        try:
            bound = signature.bind(*arguments, **parameters)
        except TypeError as error:
            raise BadInput(f"{build.__name__}: {error}; allowed: {build.__name__}{_shape(signature)}") from None
        text = ", ".join(f"{name}={value!r}" for name, value in bound.arguments.items())
        return replace(build(*bound.args, **bound.kwargs), text=f"{build.__name__}({text})" if text else build.__name__)

    _RECIPES[build.__name__] = checked
    return checked


def names() -> tuple[str, ...]:
    """Every named method, in alphabetical order."""
    return tuple(sorted(_RECIPES))


def policy(name: str, **parameters: Any) -> Policy:
    """A method by name, as configs write it: `policy("snapkv", budget=256)`.

    Raises:
        BadInput: no such method (the nearest is suggested) or a parameter it does not take.
    """
    return find(name)(**parameters)


def find(name: str) -> Callable[..., Policy]:
    """The recipe of a method.

    Raises:
        BadInput: no such method.
    """
    if name not in _RECIPES:
        raise unknown("policy", name, _RECIPES)
    return _RECIPES[name]


def _shape(signature: inspect.Signature) -> str:
    """The parameters without annotations, as a user would type them."""
    return str(
        signature.replace(
            parameters=[part.replace(annotation=inspect.Parameter.empty) for part in signature.parameters.values()],
            return_annotation=inspect.Signature.empty,
        )
    )
