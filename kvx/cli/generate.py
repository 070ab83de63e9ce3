"""`kvx generate`: continue a prompt under a cache policy, streaming the text."""

import sys
import time
from typing import Annotated, Any

import typer

from kvx.cli.policy_argument import HELP, policy_argument


def generate(
    model: Annotated[str, typer.Argument(help="A zoo name, a Hugging Face directory, or a .gguf file.")],
    prompt: Annotated[str, typer.Argument(help="The prompt; '-' reads standard input.")],
    policy: Annotated[str, typer.Option(help=HELP)] = "full",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(help="Only the k most likely tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Only the most likely tokens that reach p.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Only tokens at least this share as likely as the best.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1 repeats less.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.", min=0, max=2**32 - 1)] = 0,
    speculate: Annotated[
        int | None, typer.Option(help="Draft so many tokens a round (--policy quantspec); the text comes at the end.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system message, for models with a chat template.")] = None,
    chat: Annotated[
        bool | None, typer.Option("--chat/--no-chat", help="Use the chat template. Default: if the model has one.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON instead of streaming.")] = False,
) -> None:
    """Generate text; the bytes of the cache and the speed go to stderr.

    Examples:

        kvx generate smollm2-135m-instruct "What is a cache?"

        kvx generate smollm2-135m-instruct - --policy "snapkv(budget=256)" < long.txt

        kvx generate smollm2-135m-instruct "What is a cache?" --policy quantspec --speculate 5

        kvx generate ./my-model "Once upon a time" --no-chat --temperature 0.8 --top-p 0.95
    """
    import numpy as np

    import kvx
    from kvx.compilation_cache import enable_compilation_cache
    from kvx.errors import BadInput
    from kvx.models.token_kinds import token_kinds
    from kvx.parts.amounts import whole

    chosen = policy_argument(policy)
    rule = kvx.sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    count = whole(max_new_tokens, "max_new_tokens", least=1)
    text = _standard_input() if prompt == "-" else prompt
    if not text:
        raise BadInput("prompt is empty; allowed: at least one character")

    enable_compilation_cache()
    decoder, tokenizer = kvx.load(model)
    if chosen.by_kind:
        chosen = chosen.with_kinds(token_kinds(tokenizer))
    ids = prompt_ids(tokenizer, text, system, tokenizer.has_chat_template if chat is None else chat)
    row = np.asarray([ids])
    if speculate is not None:
        found = kvx.speculate(
            decoder, row, policy=chosen, gamma=speculate, max_new_tokens=count, sampling=rule, stop=tokenizer.eos_ids,
            seed=seed,
        )  # fmt: skip
        _report_speculation(found, tokenizer, chosen.text, len(ids), json)
        return
    begin = time.perf_counter()
    logits, cache = kvx.prefill(decoder, row, chosen, max_new_tokens=count)
    assert isinstance(cache, kvx.KVCache), "one policy gives one cache"
    nbytes = cache.nbytes
    logits.block_until_ready()
    prefilled = time.perf_counter()
    new: list[int] = []
    shown = ""
    first = prefilled
    steps = kvx.stream(
        decoder, row, policy=chosen, max_new_tokens=count, sampling=rule, stop=tokenizer.eos_ids, seed=seed,
        start=(logits, cache),
    )  # fmt: skip
    for token in steps:
        new.append(int(token[0]))
        # The first step compiles, so that it says nothing about speed.
        first = time.perf_counter() if len(new) == 2 else first
        known = tokenizer.decode(new)
        # A character of several tokens shows as U+FFFD until its last one is there.
        if not json and not known.endswith("\ufffd"):
            print(known[len(shown) :], end="", flush=True)
            shown = known
    end = time.perf_counter()
    rate = (len(new) - 2) / (end - first) if len(new) > 2 else None
    result = {
        "text": tokenizer.decode(new),
        "policy": chosen.text,
        "prompt_tokens": len(ids),
        "new_tokens": len(new),
        "cache_bytes": nbytes,
        "prefill_seconds": prefilled - begin,
        "tokens_per_second": rate,
    }
    _report(result, shown, json)


def prompt_ids(tokenizer: Any, text: str, system: str | None, chat: bool) -> list[int]:
    """Token ids of a prompt, as a chat turn or as plain text.

    Raises:
        BadInput: a system message without a chat template.
    """
    from kvx.errors import BadInput

    if not chat:
        if system is not None:
            raise BadInput("system is given, but no chat template is used; allowed: with --chat only")
        return tokenizer.encode(text)
    messages = [{"role": "user", "content": text}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return tokenizer.encode(tokenizer.chat(messages), add_special=False)


def _report_speculation(found: Any, tokenizer: Any, policy: str, prompt: int, as_json: bool) -> None:
    """Text and acceptance; no speed, since the one compiled loop's first run compiles it."""
    from json import dumps

    new = int(found.lengths[0])
    result = {
        "text": tokenizer.decode(found.tokens[0, :new].tolist()),
        "policy": policy,
        "prompt_tokens": prompt,
        "new_tokens": new,
        "cache_bytes": found.cache.nbytes,
        "target_passes": int(found.passes[0]),
        "acceptance": float(found.acceptance[0]),
    }
    if as_json:
        print(dumps(result, indent=2, ensure_ascii=False))
        return
    print(result["text"], flush=True)
    print(
        f"[{policy}: {prompt} prompt tokens in {result['cache_bytes'] / 2**20:.2f} MiB of cache, {new} tokens in "
        f"{result['target_passes']} target passes, {result['acceptance']:.0%} of drafts accepted]",
        file=sys.stderr,
    )


def _report(result: dict[str, Any], shown: str, as_json: bool) -> None:
    from json import dumps

    if as_json:
        print(dumps(result, indent=2, ensure_ascii=False))
        return
    print(result["text"][len(shown) :], flush=True)
    rate = result["tokens_per_second"]
    speed = "" if rate is None else f", {rate:.1f} tokens/s"
    print(
        f"[{result['policy']}: {result['prompt_tokens']} prompt tokens in {result['cache_bytes'] / 2**20:.2f} MiB of "
        f"cache, prefill {result['prefill_seconds']:.1f} s with compilation, {result['new_tokens']} tokens{speed}]",
        file=sys.stderr,
    )


def _standard_input() -> str:
    """All of it, whatever the locale."""
    from kvx.errors import BadInput

    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"prompt is not UTF-8 at byte {error.start}; allowed: UTF-8 text") from None
