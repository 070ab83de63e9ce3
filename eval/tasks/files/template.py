"""Published prompt templates, filled and cut in two: the context, and the question that follows it."""

import re
from collections.abc import Mapping


def filled(template: str, context: str, values: Mapping[str, str]) -> tuple[str, str]:
    """The prompt in two parts; the first ends with the record's context.

    Args:
        template: with "{context}" once, and further names in braces before and after it.
        context: what takes its place. What looks like a name in braces in it, or in a value, stays as it is.
        values: what takes the other names' places.
    """
    before, _, after = template.partition("{context}")
    return _put(before, values) + context, _put(after, values)


def _put(template: str, values: Mapping[str, str]) -> str:
    return re.sub(r"\{(\w+)\}", lambda name: values[name[1]], template)
