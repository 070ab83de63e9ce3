"""APE, adaptive parallel encoding (2025): contexts are read apart behind one prefix, and attended as if in one text."""

from kvx.errors import BadInput
from kvx.parts.share_positions import SharePositions
from kvx.policies.registry import recipe
from kvx.policy import Policy


@recipe
def ape(temperature: float = 0.9, scale: float = 0.9) -> Policy:
    """Yang, Chen, Chen 2025, "APE: Faster and Longer Context-Augmented Generation via Adaptive Parallel Encoding".

        contexts at positions P to P + c_i - 1, each sees the prefix and itself;   later tokens go on at P + max c_i
        L_c = log sum_j exp(q k_j / (sqrt(D) T)) over all contexts,   L_o likewise over all else, without T
        output = mix of the two attentions by softmax(S T L_c, L_o)

    Nothing is compressed: contexts do not pay for each other's length, and their number is not bounded by the model's
    positions. `kvx.labelled_prompt` makes the prompt; the question is the next turn:

        tokens, lengths, labels = kvx.labelled_prompt([prefix], [[document, document]])
        _, cache = kvx.prefill(model, tokens, policy, lengths, labels=labels)
        answer = kvx.generate(model, question, policy=policy, cache=cache)

    The logits of the prompt itself are those after the last context, which no other is seen from. A capped logit is
    capped first and tempered then; a sliding window is that of the shared positions. The factor is S T, on the
    log-sum-exp over all contexts together (the paper's equation; released code rounds it to the model's dtype, here it
    is float32). Parts: shared positions / tempered store.

    Args:
        temperature: T; below 1 it sharpens attention over the contexts.
        scale: S; below 1 it damps the contexts' mass where L_c > 0, and adds to it where L_c < 0.
    """
    for name, value in (("temperature", temperature), ("scale", scale)):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not 0 < value < float("inf"):
            raise BadInput(f"{name}={value!r} is out of range; allowed: a positive number")
    return Policy((SharePositions(float(temperature), float(scale)),))
