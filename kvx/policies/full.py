"""The full cache: the reference that every policy is measured against."""

from kvx.policies.registry import recipe
from kvx.policy import Policy


@recipe
def full() -> Policy:
    """Keep every token at full precision: a policy without stages."""
    return Policy(())
