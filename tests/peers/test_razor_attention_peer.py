"""Kept positions by head equal kvpress's DuoAttention masks, which split heads alike but have no mean token."""

from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
kvpress = pytest.importorskip("kvpress")

import kvx
from kvx.policies import razor_attention
from tests.kvx.policies.masked_simulation import kept_by
from tests.tiny import model, prompts

pytestmark = pytest.mark.peer

HEADS = ((0, 1), (2, 0), (3, 0), (3, 1))
LENGTH = 50


@pytest.mark.parametrize(("sinks", "recent"), [(4, 16), (1, 30), (8, 1)])
def test_streaming_heads_keep_what_duo_attention_does_not_mask(sinks, recent):
    press = kvpress.DuoAttentionPress(head_compression_ratio=0.5)
    press.sink_size, press.recent_size = sinks, recent
    press.streaming_mask = torch.ones((4, 2), dtype=torch.bool)
    press.streaming_mask[tuple(zip(*HEADS, strict=True))] = False
    policy = razor_attention(recent, None, sinks=sinks, heads=HEADS, compensate=False)
    _, cache = kvx.prefill(model(), prompts(LENGTH)[0], policy, max_new_tokens=8)
    for layer, kept in enumerate(kept_by(cache)):
        module = SimpleNamespace(layer_idx=layer, config=SimpleNamespace(_attn_implementation="sdpa"))
        press.compress(module, None, torch.zeros(1, 2, LENGTH, 32), None, None, {})
        masked = np.zeros((2, LENGTH), bool)
        _, heads, places = module.masked_key_indices
        masked[heads, places] = True
        assert kept == [np.flatnonzero(~head).tolist() for head in masked]
