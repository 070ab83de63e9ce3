"""kvx: KV-cache compression for JAX. The cache is an explicit pytree, every method a pure transformation of it."""

from kvx import policies
from kvx.cache import KVCache
from kvx.calibrate import calibrate
from kvx.chain import chain
from kvx.compilation_cache import enable_compilation_cache
from kvx.drafters import Drafter
from kvx.edit import edit
from kvx.errors import BadInput
from kvx.feeding import teacher_forced
from kvx.fork import fork
from kvx.generate import Generation, decode_step, generate, stream
from kvx.labelled import LabelledPrompt, labelled_prompt
from kvx.layer_by_layer import layer_by_layer
from kvx.policies.registry import policy
from kvx.policy import Policy
from kvx.policy_files import load_policy, save_policy
from kvx.policy_text import parse_policy
from kvx.prefill import prefill
from kvx.sampling import Sampling, sampling
from kvx.speculate import Speculation, speculate

__all__ = [
    "BadInput",
    "Drafter",
    "Generation",
    "KVCache",
    "LabelledPrompt",
    "Policy",
    "Sampling",
    "Speculation",
    "calibrate",
    "chain",
    "decode_step",
    "edit",
    "enable_compilation_cache",
    "fork",
    "generate",
    "labelled_prompt",
    "layer_by_layer",
    "load",
    "load_policy",
    "parse_policy",
    "policies",
    "policy",
    "prefill",
    "sampling",
    "save",
    "save_policy",
    "speculate",
    "stream",
    "teacher_forced",
]


def load(name_or_path, dtype=None, mesh=None):
    """A pretrained model and its tokenizer; see `kvx.models.load.load`."""
    from kvx.models.load import load

    return load(name_or_path, dtype=dtype, mesh=mesh)


def save(model, tokenizer, path):
    """Write a directory that `kvx.load` and transformers read; see `kvx.models.load.save`."""
    from kvx.models.load import save

    return save(model, tokenizer, path)
