"""The whole numbers that tasks take as options, refused outside their range."""

from kvx.errors import BadInput


def within(task: str, name: str, value: object, low: int, high: int | None = None) -> None:
    """Refuse an option's value.

    Args:
        task: named in the refusal.
        high: None: no upper limit.

    Raises:
        BadInput: not a whole number from `low` to `high`.
    """
    allowed = f"at least {low}" if high is None else f"{low} to {high}"
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        raise BadInput(f"{name}={value!r} of task {task}; allowed: whole numbers, {allowed}")
