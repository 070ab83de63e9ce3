"""Chains: one policy from several, and which of them go together."""

from kvx.errors import BadInput
from kvx.policy import Policy
from kvx.stage import Stage, overrides


def chain(*policies: Policy) -> Policy:
    """One policy from several: any number of selections, then at most one that stores.

    Raises:
        BadInput: nothing to chain, a policy that stands alone, a selection after a store, or one before a stage whose
            layers hold the same tokens.
    """
    if not policies:
        raise BadInput("chain: no policies given; allowed: one or more")
    last, stages = policies[-1], tuple(stage for policy in policies for stage in policy.stages)
    for policy in policies:
        if len(policies) > 1 and any(stage.unchained for stage in policy.stages):
            raise BadInput(f"chain: {policy.text!r} relies on slots and positions of its own; allowed: it alone")
    if any(stage.append_only for stage in stages[-1:]) and any(stage.evicts for stage in stages):
        raise BadInput(
            f"chain: {last.text!r} cannot evict at every step; allowed before it: policies that act once, "
            "after the prompt"
        )
    for place, policy in enumerate(policies):
        before = [stage for earlier in policies[:place] for stage in earlier.stages]
        if any(stage.aligned for stage in policy.stages) and any(map(_selects, before)):
            raise BadInput(
                f"chain: {policy.text!r} needs the same tokens in the same slots of all layers, and before it each "
                "layer selects its own; allowed before it: policies that keep every token"
            )
    for policy in policies[:-1]:
        if any(stage.stores for stage in policy.stages):
            raise BadInput(
                f"chain: {policy.text!r} says how tokens are stored, so nothing can follow it; allowed: selections "
                "first, then at most one policy that stores"
            )
    return Policy(stages, "+".join(policy.text for policy in policies))


def _selects(stage: Stage) -> bool:
    return stage.thins or overrides(stage, "keep")
