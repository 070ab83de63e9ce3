"""What a run or a curve was begun with, kept as JSON beside it: what goes on is compared with that, key by key."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kvx.errors import BadInput


def check_begun(
    kept: Path, now: Mapping[str, Any], what: str, allowed: str, fixed: Callable[[Any], Any] = lambda table: table
) -> None:
    """Refuse to go on with other settings than what was begun.

    Args:
        kept: the file.
        now: settings as JSON holds them, nested or flat.
        what: was begun, for refusals.
        allowed: the end of a refusal.
        fixed: of settings those that must stay.

    Raises:
        BadInput: the first key whose value differs, with both values; a file that is damaged.
    """
    try:
        table = json.loads(kept.read_text())
        if not isinstance(table, dict):
            raise ValueError
        before = flat(fixed(table))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BadInput(f"{kept} is damaged; allowed: the file as it was written, or another folder") from None
    after = flat(fixed(json.loads(json.dumps(now))))
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            raise BadInput(
                f"{key}={after.get(key)!r}, but {what} was begun with {before.get(key)!r}; allowed: {allowed}"
            )


def flat(table: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Values by the paths that lead to them, through tables and lists of tables: "stages.0.batch"."""
    found: dict[str, Any] = {}
    for name, value in table.items():
        if isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
            value = {str(index): each for index, each in enumerate(value)}
        found |= flat(value, f"{above}{name}.") if isinstance(value, dict) else {above + name: value}
    return found
