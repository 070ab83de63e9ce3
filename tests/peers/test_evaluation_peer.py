"""Scores equal those of kvpress's presses in transformers: same model, prompts, kept counts, and our scorer on both.

Passkeys of 640 tokens, the question after and before compression. The peer compresses in its prefill and then is fed
what kvx feeds through its decode path, at true positions.
"""

from contextlib import nullcontext

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
kvpress = pytest.importorskip("kvpress")

from kvx import policies
from kvx.eval.answering import answer, batches
from kvx.eval.prompts import Frame
from kvx.eval.tasks.registry import find
from kvx.eval.tasks.source import Source
from kvx.models.load import load, save
from kvx.prose import prose

pytestmark = [pytest.mark.peer, pytest.mark.weights]
transformers.utils.logging.disable_progress_bar()

LENGTH, SAMPLES, KEPT = 640, 2, 320


def _cases(length: int):
    # kvpress keeps int(length * (1 - ratio)); half a token more makes that the count whatever the rounding.
    ratio = 1 - (KEPT + 0.5) / length
    yield policies.full(), nullcontext
    yield policies.snapkv(KEPT), kvpress.SnapKVPress(ratio)
    yield policies.knorm(KEPT), kvpress.KnormPress(ratio)
    adakv = kvpress.AdaKVPress(kvpress.SnapKVPress(ratio))
    yield policies.adakv(KEPT, floor=adakv.alpha_safeguard), adakv


@pytest.fixture(scope="module")
def ours():
    return load("smollm2-135m-instruct", dtype="float32")


@pytest.fixture(scope="module")
def peer(ours, tmp_path_factory):
    path = tmp_path_factory.mktemp("smollm2") / "model"
    save(*ours, path)
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@torch.no_grad()
def _answered(peer, press, prompt: list[int], given: list[int], new_tokens: int) -> list[int]:
    """The prompt under a press, then the given tokens and greedy ones at true positions."""
    cache = transformers.DynamicCache()
    with press() if press is nullcontext else press(peer):
        peer(torch.tensor([prompt]), past_key_values=cache, logits_to_keep=1)
    fed, found = list(given), []
    for step in range(len(given) + new_tokens - 1):
        at = torch.tensor([[len(prompt) + step]])
        # Unlike kvpress's pipeline one token at a time, so that no press mistakes the question for a prompt.
        logits = peer(torch.tensor([[fed[step]]]), past_key_values=cache, position_ids=at).logits
        if step + 1 >= len(given):
            found.append(int(logits[0, -1].argmax()))
            fed.append(found[-1])
    return found


@pytest.mark.parametrize("mode", ["agnostic", "aware"])
def test_scores_equal_those_of_the_peer_sample_by_sample(ours, peer, mode):
    model, tokenizer = ours
    frame, task = Frame(), find("passkey")
    samples = task.make(Source(tokenizer, prose(), frame), LENGTH, SAMPLES, 0)
    seen = []
    for batch in batches(tokenizer, frame, samples, 1, mode):
        (sample,), context, asked = batch.samples, batch.contexts[0], batch.questions[0][0]
        prompt, given = (context, asked) if mode == "agnostic" else (context + asked[:-1], asked[-1:])
        cases = list(_cases(len(prompt)))
        found = answer(model, tokenizer, batch, mode, [policy for policy, _ in cases], by_layer=True)
        for (policy, answered), (_, press) in zip(found, cases, strict=True):
            (question,) = sample.questions
            theirs = tokenizer.decode(_answered(peer, press, prompt, given, question.new_tokens))
            held = np.asarray(answered.cache.layers[0].positions())[0] >= 0
            assert held.sum() == len(held) * (len(prompt) if policy.text == "full" else KEPT)
            scores = task.score(answered.texts[0][0], question), task.score(theirs, question)
            assert scores[0] == scores[1], f"{policy.text}: {answered.texts[0][0]!r} against {theirs!r}"
            seen.append(scores[0])
    assert 0 < sum(seen) < len(seen), "both outcomes occur, so equality says something"
