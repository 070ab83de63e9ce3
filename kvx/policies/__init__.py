"""Named methods: one file each, a recipe of parts under the paper's defaults."""

from kvx.policies.adakv import adakv
from kvx.policies.d2o import d2o
from kvx.policies.full import full
from kvx.policies.h2o import h2o
from kvx.policies.kivi import kivi
from kvx.policies.knorm import knorm
from kvx.policies.mikv import mikv
from kvx.policies.minicache import minicache
from kvx.policies.pyramidkv import pyramidkv
from kvx.policies.q_filters import q_filters
from kvx.policies.quest import quest
from kvx.policies.registry import find, names, policy
from kvx.policies.snapkv import snapkv
from kvx.policies.streaming_llm import streaming_llm
from kvx.policies.tova import tova

__all__ = [
    "adakv",
    "d2o",
    "find",
    "full",
    "h2o",
    "kivi",
    "knorm",
    "mikv",
    "minicache",
    "names",
    "policy",
    "pyramidkv",
    "q_filters",
    "quest",
    "snapkv",
    "streaming_llm",
    "tova",
]
