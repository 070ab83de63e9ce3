"""Claims about `kvx generate`: what it prints is what the library generates, whole characters only."""

import json

import jax.numpy as jnp
import pytest

import kvx
from kvx.cli import main
from tests.eval.letters import Letters
from tests.tiny import model


class Chatty(Letters):
    """The letters, with a chat template."""

    has_chat_template = True

    def chat(self, messages) -> str:
        """Every message as role and content."""
        return "".join(f"[{message['role']}]{message['content']}" for message in messages) + "[assistant]"


@pytest.fixture
def loaded(monkeypatch):
    """The small model in place of the one that is named."""
    monkeypatch.setattr("kvx.load", lambda name: (model(), Chatty()))
    monkeypatch.setattr("kvx.compilation_cache.enable_compilation_cache", lambda: None)


def expected(prompt: str, **arguments) -> str:
    ids = Letters().encode(prompt)
    result = kvx.generate(model(), jnp.asarray([ids]), **arguments)
    return Letters().decode([token for token in result.tokens[0].tolist() if token >= 0])


def run(*arguments):
    with pytest.raises(SystemExit) as end:
        main(["generate", "small", *arguments])
    assert end.value.code == 0


def test_the_streamed_text_is_what_the_library_generates(loaded, capsys):
    run("Hello there", "--no-chat", "--max-new-tokens", "12")
    shown = capsys.readouterr()
    assert shown.out == expected("Hello there", max_new_tokens=12) + "\n"
    assert "full: 11 prompt tokens in" in shown.err and "MiB" in shown.err and "tokens/s" in shown.err


def test_chat_is_the_default_where_there_is_a_template_and_json_tells_bytes(loaded, capsys):
    run("Hi", "--system", "Be brief", "--max-new-tokens", "8", "--policy", "streaming_llm(budget=24)", "--json")
    result = json.loads(capsys.readouterr().out)
    policy = kvx.policies.streaming_llm(budget=24)
    prompt = "[system]Be brief[user]Hi[assistant]"
    assert result["text"] == expected(prompt, policy=policy, max_new_tokens=8)
    _, cache = kvx.prefill(model(), jnp.asarray([Letters().encode(prompt)]), policy, max_new_tokens=8)
    assert result["cache_bytes"] == cache.nbytes and result["new_tokens"] == 8


def test_sampling_is_reproducible_by_its_seed(loaded, capsys):
    texts = []
    for seed in ("1", "1", "2"):
        run("Hello", "--no-chat", "--temperature", "1.5", "--seed", seed, "--max-new-tokens", "12")
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_standard_input_is_read(loaded, capsys, monkeypatch):
    import io

    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Hello there")))
    run("-", "--no-chat", "--max-new-tokens", "4")
    assert capsys.readouterr().out == expected("Hello there", max_new_tokens=4) + "\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9 abc")))
    with pytest.raises(SystemExit) as end:
        main(["generate", "small", "-"])
    assert end.value.code == 2 and "prompt is not UTF-8 at byte 3" in capsys.readouterr().err


@pytest.mark.slow
def test_speculation_prints_the_text_of_the_same_policy_and_its_acceptance(loaded, capsys):
    arguments = ("Hello there", "--no-chat", "--max-new-tokens", "12", "--policy", "quantspec", "--speculate", "3")
    run(*arguments)
    shown = capsys.readouterr()
    text = expected("Hello there", policy=kvx.policies.quantspec(), max_new_tokens=12)
    assert shown.out == text + "\n" and "% of drafts accepted" in shown.err
    run(*arguments, "--json")
    result = json.loads(capsys.readouterr().out)
    assert result["text"] == text and result["new_tokens"] == 12 and 3 <= result["target_passes"] <= 11
