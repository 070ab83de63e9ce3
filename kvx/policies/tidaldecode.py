"""TidalDecode (2024): the exact top tokens of two layers serve all layers above them, step by step."""

from kvx.errors import BadInput
from kvx.parts.amounts import Slots, amount, one_of, whole
from kvx.parts.reuse import Reuse
from kvx.policies.knorm import layer_list
from kvx.policies.registry import recipe
from kvx.policy import Policy

DEPTHS = (2 / 32, 13 / 32)
"""Where Llama 3's 32 layers choose."""


@recipe
def tidaldecode(
    budget: int | float = 256, layers: tuple[int, ...] | None = None, recent: int = 4, group: str | None = None
) -> Policy:
    """Yang et al. 2024, "TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse Attention".

        I_h = top k of softmax(q_h K / sqrt(D)) in a layer that chooses,    out_h = attention over I_h in those above

    Layers that choose attend to everything, as do those below the first of them; the choice is made anew at every step.
    Nothing is evicted: resident bytes grow, bytes read do not, but in the layers read whole. The prompt is exact.
    Parts: true probabilities of this step / each query head, or shared / top k / forced recent tokens / across layers.

    Which layers choose well differs by model and is worth a sweep. The paper forces no token in its accuracy runs and
    the current one in its kernel; here the newest four are, since a layer that chooses may not look at them though
    those above do. Its correction of the cache, running decoded tokens again with full attention, is not part of this.

    Args:
        budget: slots of a choice, forced ones included, or a share of the prompt; of every query head, so that a KV
            head reads up to as many times more as query heads share it.
        layers: which choose; negative ones count from the top. None: layers 2 and 13 of 32, by the model's depth.
        recent: newest tokens in every choice, the current one included; 0: none is forced.
        group: one choice a KV head, by the "max" or "mean" of its query heads' probabilities; None: one each.
    """
    kept = amount(budget)
    whole(recent, "recent", least=0)
    if isinstance(kept, Slots) and recent > kept.count:
        raise BadInput(f"recent={recent} protects more slots than budget={kept.count} has; allowed: at most {budget}")
    one_of(group, "group", ("max", "mean", None))
    if layers is not None:
        layers = layer_list(layers, "layers")
        if not layers:
            raise BadInput("layers=() lets no layer choose; allowed: at least one layer, or None for the default")
    return Policy((Reuse(kept, DEPTHS, layers, recent, group),))
