"""Direct preference optimisation: the loss of a pair of answers under a policy and its frozen reference."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def dpo_loss(
    chosen: Float[Array, "B"],
    rejected: Float[Array, "B"],
    reference_chosen: Float[Array, "B"],
    reference_rejected: Float[Array, "B"],
    beta: float = 0.01,
) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """-log sigmoid(beta ((log pi(y_w) - log ref(y_w)) - (log pi(y_l) - log ref(y_l)))).

    Rafailov et al. 2023, equation 7; log 2 where policy and reference are equal.

    Args:
        chosen, rejected: log-probability of each whole answer given its prompt, under the policy.
        reference_chosen, reference_rejected: under the reference; no gradient goes into them.
        beta: how closely the policy is held to the reference.

    Returns:
        Each pair's loss in nats, and its margin: beta times the difference within the sigmoid.
    """
    reference = jax.lax.stop_gradient(reference_chosen - reference_rejected)
    margin = beta * ((chosen - rejected) - reference)
    return jnp.logaddexp(0.0, -margin), margin
