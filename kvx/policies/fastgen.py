"""FastGen (2023): every head is profiled on the prompt and gets the cheapest rule that recovers its attention."""

from kvx.errors import BadInput
from kvx.parts.amounts import fraction, whole
from kvx.parts.profile import Profile
from kvx.policies.registry import recipe
from kvx.policy import Policy


@recipe
def fastgen(
    recovery: float = 0.95,
    frequent: float = 0.3,
    local: float = 0.3,
    sinks: int = 1,
    shortest: int = 64,
    reserve: float = 0.25,
) -> Policy:
    """Ge et al. 2023, "Model Tells You What to Discard: Adaptive KV Cache Compression for LLMs".

        the first of: special tokens; and punctuation; and frequent ones; and local ones; everything
        whose share of the head's attention over the prompt is at least T

    One choice for every KV head, row and layer, on the user's own prompt. While decoding, an ordinary token under the
    first two rules is seen in its own step and then gone; under the next two it takes the slot of the ordinary token of
    least mean attention; special tokens and punctuation stay where the rule keeps them. Parts: mean attention and
    kinds / by head, recovered mass / drop / after prefill, every step.

    Which ids are special or punctuation is the tokenizer's to say:
    `kvx.policies.fastgen().with_kinds(kvx.models.token_kinds.token_kinds(tokenizer))`; the command line does so.
    Without it only the first tokens count as special.

    Shares are of the prompt's length, at the profile and after it. (The paper's grow with the text; the published
    reproduction fills by the planned length, so that a short prompt at first keeps everything.)

    Args:
        recovery: T; 1 keeps everything in a head of broad attention, 0 only special tokens in every head.
        frequent: share of the prompt's length: heavy hitters, by mean attention over the queries that could see them.
        local: share of the prompt's length: the newest tokens.
        sinks: first tokens that count as special.
        shortest: in prompts shorter than this every head keeps everything; their profile would be noise.
        reserve: share of the generated tokens that may be of kinds a head keeps; it has room for so many, and beyond
            them the oldest generated one goes. A head that keeps everything has room for all.
    """
    threshold, heavy, newest = fraction(recovery, "recovery"), fraction(frequent, "frequent"), fraction(local, "local")
    if heavy + newest > 1:
        raise BadInput(f"frequent={frequent} and local={local} exceed the prompt; allowed: a sum of at most 1")
    first = whole(sinks, "sinks", least=0)
    return Policy(
        (Profile(threshold, heavy, newest, first, whole(shortest, "shortest", least=1), fraction(reserve, "reserve")),)
    )
