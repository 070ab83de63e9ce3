"""Policies as text, such as "snapkv(budget=0.25)+kivi(bits=2)", read by a small recursive descent parser.

    policy = method { "+" method }
    method = name [ "(" [ argument { "," argument } [ "," ] ] ")" ]
    argument = [ name "=" ] value
    value = integer | float | string | word | True | False | None | "(" [ value { "," value } [ "," ] ] ")"

Nothing is ever evaluated: a name can only be that of a registered method, a value only one of the literals above.
"""

import inspect
import math
import re
from collections.abc import Mapping
from typing import Any

from kvx.chain import chain
from kvx.errors import BadInput, unknown
from kvx.policies.registry import find, names
from kvx.policy import Policy

LONGEST = 16000
"""Characters a policy's text may have: bounds the work.

Enough for a policy that names 15 percent of 10,000 heads.
"""

DIGITS = 40
"""Characters of a number."""

DEEPEST = 8
"""Tuples within tuples."""

_SPACE = re.compile(r"\s*")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_NUMBER = re.compile(r"-?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?(?![\w.])")
_STRING = re.compile(r"'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\"", re.DOTALL)
_WORDS = {"True": True, "False": False, "None": None, "nan": math.nan, "inf": math.inf}
_ESCAPES = {"\\": "\\", "'": "'", '"': '"', "n": "\n", "t": "\t", "r": "\r"}
_VALUES = "a number, a word, a quoted string, True, False, None, or a tuple of them"


def parse_policy(text: str) -> Policy:
    """The policy that a text describes; the inverse of `Policy.text`.

    Args:
        text: methods joined by "+", each with its parameters by position or by name; words need no quotes:
            "snapkv(256, pooling=max)+kivi(bits=2)".

    Raises:
        BadInput: text that does not follow the grammar (with the column and what is allowed there), an unknown method
            or parameter, a value that the method refuses, a chain that cannot be.
    """
    if not isinstance(text, str):
        raise BadInput(f"policy text is of type {type(text).__name__}; allowed: str")
    if len(text) > LONGEST:
        raise BadInput(f"policy text has {len(text)} characters; allowed: at most {LONGEST}")
    policies = _Parser(text).policies()
    return policies[0] if len(policies) == 1 else chain(*policies)


def amended(text: str, stage: int, values: Mapping[str, Any]) -> str:
    """The text with parameters of one of its methods set.

    Args:
        text: as `Policy.text` has it.
        stage: index of a stage of the policy; the method that made it is meant.
        values: parameters by name.

    Returns:
        The text as it was, if it is not that of named methods: a policy put together by hand.
    """
    if not values:
        return text
    try:
        found = _Parser(text).calls()
    except BadInput:
        return text
    calls, first = [], 0
    for name, positional, named in found:
        policy = find(name)(*positional, **named)
        if first <= stage < first + len(policy.stages):
            given = dict(zip(inspect.signature(find(name)).parameters, positional, strict=False))
            policy = find(name)(**{**given, **named, **values})
        calls.append(policy.text)
        first += len(policy.stages)
    return "+".join(calls)


class _Parser:
    """A cursor over the text; every method consumes what its name says, and the blanks after it."""

    def __init__(self, text: str):
        self.text, self.at = text, 0
        self._skip()

    def policies(self) -> list[Policy]:
        return [find(name)(*positional, **named) for name, positional, named in self.calls()]

    def calls(self) -> list[tuple[str, list[Any], dict[str, Any]]]:
        """Every method's name and its arguments by position and by name."""
        found = [self.method()]
        while self._accept("+"):
            found.append(self.method())
        if self.at < len(self.text):
            raise self._refuse("'+' and another method, or the end")
        return found

    def method(self) -> tuple[str, list[Any], dict[str, Any]]:
        start = self.at
        name = self._name(f"the name of a method ({', '.join(names())})")
        if name not in names():
            raise BadInput(f"policy {self._shown()}, column {start + 1}: {unknown('policy', name, names())}")
        positional: list[Any] = []
        named: dict[str, Any] = {}
        if self._accept("("):
            while not self._accept(")"):
                self._argument(positional, named)
                if not self._accept(","):
                    self._expect(")", "',' or ')'")
                    break
        return name, positional, named

    def _argument(self, positional: list[Any], named: dict[str, Any]) -> None:
        start = self.at
        word = _NAME.match(self.text, start)
        if word:
            self._move(word.end())
            if self._accept("="):
                if word[0] in named:
                    raise self._refuse(f"each parameter once, and {word[0]!r} came before", start)
                named[word[0]] = self.value(0)
                return
            self.at = start
        if named:
            raise self._refuse("name=value, since a named parameter came before", start)
        positional.append(self.value(0))

    def value(self, depth: int) -> Any:
        if number := _NUMBER.match(self.text, self.at):
            self._move(number.end())
            if len(number[0]) > DIGITS:
                raise self._refuse(f"numbers of at most {DIGITS} characters", number.start())
            whole = re.fullmatch(r"-?\d+", number[0])
            return int(number[0]) if whole else float(number[0])
        if string := _STRING.match(self.text, self.at):
            body = string[1] if string[1] is not None else string[2]
            value = self._unescaped(body)
            self._move(string.end())
            return value
        if word := _NAME.match(self.text, self.at):
            self._move(word.end())
            return _WORDS.get(word[0], word[0])
        if self._accept("("):
            return self._tuple(depth + 1)
        raise self._refuse(_VALUES)

    def _tuple(self, depth: int) -> Any:
        if depth > DEEPEST:
            raise self._refuse(f"at most {DEEPEST} tuples within each other")
        values: list[Any] = []
        while not self._accept(")"):
            values.append(self.value(depth))
            if not self._accept(","):
                self._expect(")", "',' or ')'")
                # As in Python, brackets alone make no tuple: (1) is 1, (1,) is a tuple.
                return values[0] if len(values) == 1 else tuple(values)
        return tuple(values)

    def _unescaped(self, body: str) -> str:
        def one(match: re.Match[str]) -> str:
            if match[1] not in _ESCAPES:
                raise self._refuse(f"a string with the escapes {' '.join(chr(92) + key for key in 'ntr')} and quotes")
            return _ESCAPES[match[1]]

        return re.sub(r"\\(.)", one, body, flags=re.DOTALL)

    def _name(self, allowed: str) -> str:
        word = _NAME.match(self.text, self.at)
        if not word:
            raise self._refuse(allowed)
        self._move(word.end())
        return word[0]

    def _accept(self, mark: str) -> bool:
        if not self.text.startswith(mark, self.at):
            return False
        self._move(self.at + len(mark))
        return True

    def _expect(self, mark: str, allowed: str) -> None:
        if not self._accept(mark):
            raise self._refuse(allowed)

    def _move(self, end: int) -> None:
        self.at = end
        self._skip()

    def _skip(self) -> None:
        blank = _SPACE.match(self.text, self.at)
        assert blank is not None, "the pattern matches the empty string"
        self.at = blank.end()

    def _shown(self) -> str:
        return repr(self.text if len(self.text) <= 100 else self.text[:97] + "...")

    def _refuse(self, allowed: str, at: int | None = None) -> BadInput:
        at = self.at if at is None else at
        found = repr(self.text[at : at + 12]) if at < len(self.text) else "the end"
        return BadInput(f"policy {self._shown()}, column {at + 1}: found {found}; allowed: {allowed}")
