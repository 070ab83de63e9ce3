"""Named methods: one file each, a recipe of parts under the paper's defaults."""

from kvx.policies.adakv import adakv
from kvx.policies.ape import ape
from kvx.policies.cake import cake
from kvx.policies.cam import cam
from kvx.policies.d2o import d2o
from kvx.policies.fastgen import fastgen
from kvx.policies.full import full
from kvx.policies.h2o import h2o
from kvx.policies.hashevict import hashevict
from kvx.policies.kivi import kivi
from kvx.policies.knorm import knorm
from kvx.policies.latent_codes import latent_codes
from kvx.policies.less import less
from kvx.policies.mikv import mikv
from kvx.policies.minicache import minicache
from kvx.policies.paged import paged
from kvx.policies.pyramidinfer import pyramidinfer
from kvx.policies.pyramidkv import pyramidkv
from kvx.policies.q_filters import q_filters
from kvx.policies.quantspec import quantspec
from kvx.policies.quest import quest
from kvx.policies.razor_attention import razor_attention
from kvx.policies.registry import find, names, policy
from kvx.policies.roco import roco
from kvx.policies.shadowkv import shadowkv
from kvx.policies.snapkv import snapkv
from kvx.policies.streaming_llm import streaming_llm
from kvx.policies.tidaldecode import tidaldecode
from kvx.policies.tova import tova

__all__ = [
    "adakv",
    "ape",
    "cake",
    "cam",
    "d2o",
    "fastgen",
    "find",
    "full",
    "h2o",
    "hashevict",
    "kivi",
    "knorm",
    "latent_codes",
    "less",
    "mikv",
    "minicache",
    "names",
    "paged",
    "policy",
    "pyramidinfer",
    "pyramidkv",
    "q_filters",
    "quantspec",
    "quest",
    "razor_attention",
    "roco",
    "shadowkv",
    "snapkv",
    "streaming_llm",
    "tidaldecode",
    "tova",
]
