"""The one error for bad input: a sentence that names the argument, its value and what is allowed.

The command line prints it on one line and exits with status 2; everything else is a bug and keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class BadInput(ValueError):
    """Input that kvx refuses before any long work, with one sentence that says what would be accepted."""


def unknown(what: str, value: str, known: Iterable[str]) -> BadInput:
    """The refusal of a name that is not in `known`, with the nearest one suggested."""
    names = sorted(known)
    near = difflib.get_close_matches(value, names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return BadInput(f"unknown {what} {value!r}: {hint}known: {', '.join(names) or 'none'}")
