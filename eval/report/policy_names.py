"""A policy's text taken apart for a reader: its family, which is its methods, and a short label with its numbers."""

import re

LONGEST = 44
"""Characters of a label; the whole text stands in the table and beside the pointer."""

_STRING = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", re.DOTALL)
_METHOD = re.compile(r"\s*([^()+\s]+)\s*(?:\((.*)\))?\s*", re.DOTALL)


def family(policy: str) -> str:
    """Its methods without their parameters: "snapkv(budget=0.25)+kivi(bits=2)" is of the family "snapkv+kivi"."""
    return _short("+".join(name for name, _ in _methods(policy)))


def label(policy: str) -> str:
    """Its methods with their parameters, as short as can be: "snapkv 0.25 + kivi bits=2"."""
    return _short(" + ".join(" ".join(filter(None, each)) for each in _methods(policy)))


def _methods(policy: str) -> list[tuple[str, str]]:
    """Names and arguments. Text that is no policy's is a name."""
    found = []
    for part in _split(policy):
        match = _METHOD.fullmatch(part)
        name, arguments = (match[1], match[2] or "") if match else (part.strip(), "")
        found.append((name, re.sub(r"\bbudget=", "", arguments.strip())))
    return found


def _split(policy: str) -> list[str]:
    """At every "+" outside of parentheses and quotes."""
    # Quoted text gives way to as many blanks, so that places in both texts agree.
    plain = _STRING.sub(lambda quoted: " " * len(quoted[0]), policy)
    depth, cuts = 0, [-1]
    for place, character in enumerate(plain):
        depth += (character == "(") - (character == ")")
        if character == "+" and depth == 0:
            cuts.append(place)
    return [policy[first + 1 : last] for first, last in zip(cuts, [*cuts[1:], len(policy)], strict=True)]


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
