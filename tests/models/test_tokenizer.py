"""Tokenizers from GGUF metadata and from tokenizer.json encode as their models were trained, and lose nothing."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvx.errors import BadInput
from kvx.models import zoo
from kvx.models.checkpoint import Checkpoint
from kvx.models.readers import gguf_vocabulary, read_checkpoint
from kvx.models.readers.gguf_vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, rebuild_tokenizer
from kvx.models.tokenizer import Tokenizer

BYTES = [f"<0x{value:02X}>" for value in range(256)]
TEXTS = [
    "",
    " ",
    "Hello world",
    "  two spaces,\ttab\n\n\nlines \r\n",
    "don't I'll we've 1234567 3.14",
    "héllo naïve ☃ 🙂👩‍👩‍👧 e\u0301",
    "日本語のテキスト 中文 한국어 العربية हिन्दी",
    "def f(x):\n    return x ** 2  # comment\n",
    "<|im_start|> not <bos> special?",
]


def sentencepiece(pieces: dict[str, float], **keys) -> dict:
    """Metadata of a "llama" vocabulary: three specials, all bytes, then `pieces` with their scores."""
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *pieces]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(pieces)]
    scores = [0.0] * 259 + list(pieces.values())
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.array(scores, np.float32),
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        **{f"tokenizer.ggml.{key}": value for key, value in keys.items()},
    }


def byte_level(words: tuple[str, ...] = (), merges: tuple[str, ...] = (), pre: str = "gpt-2", **keys) -> dict:
    """Metadata of a "gpt2" vocabulary: printable ASCII, the marks of blank and newline, `words`, one special."""
    tokens = [*map(chr, range(33, 127)), "Ġ", "Ċ", *words, "<end>"]
    types = [NORMAL] * (len(tokens) - 1) + [CONTROL]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": list(merges),
        "tokenizer.ggml.token_type": np.array(types, np.int32),
        "tokenizer.ggml.eos_token_id": len(tokens) - 1,
        **{f"tokenizer.ggml.{key}": value for key, value in keys.items()},
    }


def built(metadata: dict) -> Tokenizer:
    return Tokenizer(*rebuild_tokenizer(metadata, len(metadata["tokenizer.ggml.tokens"]), "test.gguf"))


def pieces_of(tokenizer: Tokenizer, text: str, add_special: bool = False) -> list[str]:
    ids = {index: token for token, index in tokenizer.specification["model"]["vocab"].items()}
    return [ids[index] for index in tokenizer.encode(text, add_special)]


def naive_bpe(symbols: list[str], scores: dict[str, float], tie) -> list[str]:
    """SentencePiece's BPE by its definition: merge the best neighbours until none form a piece."""
    symbols = list(symbols)
    while True:
        pairs = [(symbols[i], symbols[i + 1], i) for i in range(len(symbols) - 1)]
        pairs = [pair for pair in pairs if pair[0] + pair[1] in scores]
        if not pairs:
            return symbols
        _, _, at = min(pairs, key=lambda pair: (-scores[pair[0] + pair[1]], *tie(pair)))
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]


@given(
    st.lists(st.text("ab▁", min_size=2, max_size=5), max_size=30, unique=True),
    st.text("ab ", max_size=20),
    st.randoms(use_true_random=False),
)
@settings(max_examples=200, deadline=None)
def test_merges_by_score_are_sentencepiece_bpe(longer, text, draw):
    names = ["a", "b", "▁", *longer]
    draw.shuffle(names)
    scores = {name: -float(rank) for rank, name in enumerate(names)}
    ids = {name: index for index, name in enumerate(names)}
    expected = naive_bpe(list(text.replace(" ", "▁")), scores, lambda pair: (ids[pair[0]], ids[pair[1]], pair[2]))
    assert pieces_of(built(sentencepiece(scores, add_space_prefix=False)), text) == expected


def test_the_best_score_merges_first_not_the_longest_piece():
    # A Unigram reading would take "abc" in one piece; by score "bc" merges first, and "a" + "bc" has no better name.
    scores = {"a": -5.0, "b": -6.0, "c": -7.0, "bc": -1.0, "ab": -2.0, "abc": -9.0}
    assert pieces_of(built(sentencepiece(scores, add_space_prefix=False)), "abcab") == ["abc", "ab"]
    del scores["abc"]
    assert pieces_of(built(sentencepiece(scores, add_space_prefix=False)), "abcab") == ["a", "bc", "ab"]


def test_begin_of_text_and_space_prefix():
    scores = {"▁": -1.0, "a": -2.0, "▁a": -0.5}
    tokenizer = built(sentencepiece(scores))
    assert pieces_of(tokenizer, "a a", True) == ["<s>", "▁a", "▁a"]
    assert pieces_of(tokenizer, "a a") == ["▁a", "▁a"]
    assert tokenizer.decode(tokenizer.encode("a a")) == "a a" and tokenizer.bos_id == 1
    bare = built(sentencepiece(scores, add_space_prefix=False, add_bos_token=False))
    assert pieces_of(bare, "a a", True) == ["a", "▁a"]
    assert bare.decode(bare.encode("a a")) == "a a"
    ended = built(sentencepiece(scores, add_eos_token=True))
    assert pieces_of(ended, "a", True) == ["<s>", "▁a", "</s>"]


def test_unknown_characters_fall_back_to_bytes():
    tokenizer = built(sentencepiece({"▁": -1.0, "a": -2.0}, add_space_prefix=False))
    assert pieces_of(tokenizer, "a☃") == ["a", "<0xE2>", "<0x98>", "<0x83>"]
    assert tokenizer.decode(tokenizer.encode("a☃ a")) == "a☃ a"


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
@settings(max_examples=100, deadline=None)
def test_byte_fallback_loses_nothing(text):
    tokenizer = built(sentencepiece({"▁": -1.0, "a": -2.0, "▁a": -0.5}, add_space_prefix=False))
    if "▁" not in text and not any(special in text for special in ("<unk>", "<s>", "</s>")):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_user_defined_tokens_are_cut_out_of_the_raw_text():
    metadata = sentencepiece({"▁": -1.0, "a": -2.0, "  ": -1000.0, "▁a": -0.5}, add_space_prefix=False)
    metadata["tokenizer.ggml.token_type"][-2] = USER_DEFINED
    tokenizer = built(metadata)
    assert pieces_of(tokenizer, "a   a") == ["a", "  ", "▁a"]
    assert tokenizer.decode(tokenizer.encode("a   a")) == "a   a"  # a user-defined token is text, not special


def test_byte_level_merges_in_the_given_order():
    tokenizer = built(byte_level(("ab", "bc", "abc"), ("b c", "a b", "a bc")))
    assert pieces_of(tokenizer, "abcab") == ["abc", "ab"]
    assert tokenizer.bos_id is None and tokenizer.eos_ids == (tokenizer.vocabulary - 1,)
    assert pieces_of(tokenizer, "ab<end>") == ["ab", "<end>"]
    assert tokenizer.decode(tokenizer.encode("ab<end>")) == "ab"
    assert tokenizer.decode(tokenizer.encode("ab<end>"), skip_special=False) == "ab<end>"


@pytest.mark.parametrize(
    ("pre", "text", "expected"),
    [
        ("gpt-2", "x123", ["x", "123"]),
        ("smollm", "x123", ["x", "1", "2", "3"]),
        ("qwen2", "x123", ["x", "1", "2", "3"]),
        ("llama-bpe", "x12123", ["x", "121", "2", "3"]),
        ("default", "x123+", ["x", "123", "+"]),
        ("gpt-2", "a\n\nx", ["a", "Ċ", "Ċ", "x"]),
        ("llama-bpe", "a !\n", ["a", "Ġ", "!", "Ċ"]),
    ],
)
def test_pre_tokenizers_cut_digits_as_documented(pre, text, expected):
    # With "12 3" and "12 1" mergeable, a merge happens only where the expression left the digits together.
    tokenizer = built(byte_level(("12", "123", "121"), ("1 2", "12 3", "12 1"), pre, bos_token_id=0))
    assert pieces_of(tokenizer, text) == expected


def test_a_whole_word_of_llama3_needs_no_merges():
    tokenizer = built(byte_level(("word",), (), "llama-bpe", bos_token_id=0, add_bos_token=False))
    assert pieces_of(tokenizer, "word") == ["word"]
    assert pieces_of(built(byte_level(("word",), (), "gpt-2")), "word") == list("word")


def test_llama3_begins_with_its_bos_unless_told_otherwise():
    assert pieces_of(built(byte_level((), (), "llama-bpe", bos_token_id=3)), "a", True) == ["$", "a"]


def test_turns_end_generation_where_the_template_writes_them():
    metadata = byte_level(("<|im_end|>", "<|eot_id|>"), (), eot_token_id=0)
    metadata["tokenizer.chat_template"] = "{{ messages[0].content }}<|im_end|>"
    tokenizer = built(metadata)
    vocabulary = tokenizer.specification["model"]["vocab"]
    assert tokenizer.eos_ids == (vocabulary["<end>"], 0, vocabulary["<|im_end|>"])
    assert tokenizer.has_chat_template and tokenizer.chat([{"role": "user", "content": "hi"}]) == "hi<|im_end|>"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model": "gpt3"}, "unknown GGUF tokenizer model 'gpt3': did you mean 'gpt2'"),
        ({"pre": "qwen3"}, "unknown GGUF pre-tokenizer 'qwen3': did you mean 'qwen2'"),
        ({"pre": 3}, "pre is of type int, allowed is str"),
        ({"tokens": ["a"]}, "tokens has 1 entries, the embedding 98 rows"),
        ({"tokens": ["a"] * 98}, "holds a token twice"),
        ({"token_type": np.ones(3, np.int32)}, "token_type has 3 entries"),
        ({"merges": ["a b"]}, "merge 0 .* not in the vocabulary"),
        ({"merges": ["ab"]}, "merge 0 .* not in the vocabulary"),
        ({"merges": [""]}, "merge 0 .* not in the vocabulary"),
        ({"merges": None}, "merges is missing"),
        ({"eos_token_id": 98}, "eos_token_id is 98, allowed are 0 to 97"),
        ({"bos_token_id": -1}, "bos_token_id is -1"),
        ({"bos_token_id": True}, "bos_token_id is True"),
        ({"add_bos_token": True}, "does not say which token"),
    ],
)
def test_a_fault_of_byte_level_metadata_is_named(change, reason):
    metadata = byte_level(("xy",), ("x y",)) | {f"tokenizer.ggml.{key}": value for key, value in change.items()}
    with pytest.raises(BadInput, match=reason) as refusal:
        rebuild_tokenizer(metadata, 98, "bad.gguf")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("scores", "reason"),
    [
        (np.zeros(3, np.float32), "scores has 3 entries"),
        (np.full(260, np.nan, np.float32), "not finite"),
        (None, "scores is missing"),
    ],
)
def test_a_fault_of_scores_is_named(scores, reason):
    with pytest.raises(BadInput, match=reason):
        rebuild_tokenizer(sentencepiece({"a": 0.0}, scores=scores), 260, "bad.gguf")


def test_a_piece_whose_splits_would_take_minutes_is_refused():
    with pytest.raises(BadInput, match="the longest token 100000"):
        built(sentencepiece({"a" * 100_000: -1.0}))


class NoTensors(dict):
    def shape(self, name):
        raise KeyError(name)


def test_more_merges_than_any_vocabulary_has_are_refused(monkeypatch):
    monkeypatch.setattr(gguf_vocabulary, "MAX_MERGES", 10)
    with pytest.raises(BadInput, match="more than 10 merges"):
        built(sentencepiece({"a" * length: -float(length) for length in range(1, 9)}))


def test_a_file_without_tokenizer_has_none():
    assert rebuild_tokenizer({}, 5, "x.gguf") == (None, {})
    with pytest.raises(BadInput, match="has no tokenizer"):
        Tokenizer.from_checkpoint(Checkpoint({}, NoTensors(), None, {}))


@pytest.mark.parametrize(
    "specification",
    [
        {},
        {"model": 3},
        {"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}},
        {"version": "1.0", "model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}},
        {"version": "1.0", "model": {"type": "Nope"}},
    ],
)
def test_a_specification_that_cannot_be_used_is_refused(specification):
    with pytest.raises(BadInput, match="specification cannot be used") as refusal:
        Tokenizer(specification, {})
    assert "\n" not in str(refusal.value)


def test_a_panic_of_the_tokenizers_package_is_a_refusal(capfd):
    specification, special = rebuild_tokenizer(sentencepiece({"a": -1.0}), 260, "x.gguf")
    specification["post_processor"]["special_tokens"] = {}
    with pytest.raises(BadInput, match="specification cannot be used"):
        Tokenizer(specification, special)


def test_truncation_and_padding_of_a_file_are_not_obeyed():
    specification, special = rebuild_tokenizer(byte_level(), 97, "x.gguf")
    specification["truncation"] = {
        "direction": "Right",
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    assert len(Tokenizer(json.loads(json.dumps(specification)), special).encode("abcdef")) == 6


def test_a_bos_asked_for_by_the_configuration_alone_is_added():
    specification, special = rebuild_tokenizer(byte_level(), 97, "x.gguf")
    tokenizer = Tokenizer(specification, special | {"bos_token": "!", "add_bos_token": True})
    assert pieces_of(tokenizer, "ab", True) == ["!", "a", "b"] and pieces_of(tokenizer, "ab") == ["a", "b"]


def test_bad_arguments_are_refused():
    tokenizer = built(byte_level())
    refusals = [
        (lambda: tokenizer.encode("a\ud800"), "lone surrogate at character 1"),
        (lambda: tokenizer.decode([97]), "ids hold 97, allowed are 0 to 96"),
        (lambda: tokenizer.decode([-1]), "ids hold -1"),
        (lambda: tokenizer.decode([0.5]), "integers"),
        (lambda: tokenizer.decode(np.zeros((2, 2), int)), "one row of integers"),
        (lambda: tokenizer.chat([{"role": "user", "content": "x"}]), "no chat template"),
    ]
    for call, reason in refusals:
        with pytest.raises(BadInput, match=reason):
            call()
    talking = Tokenizer(tokenizer.specification, tokenizer.special | {"chat_template": "x"})
    for messages, reason in (([], "messages are empty"), ([{"role": "user"}], "message 0 has keys")):
        with pytest.raises(BadInput, match=reason):
            talking.chat(messages)


def test_arrays_and_empty_rows_decode():
    tokenizer = built(byte_level())
    assert tokenizer.decode(np.array(tokenizer.encode("ab"), np.int32)) == "ab" and tokenizer.decode([]) == ""


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    return Tokenizer.from_checkpoint(read_checkpoint(zoo.fetch("smollm2-135m-instruct")))


@pytest.mark.weights
@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_round_trips(smollm2, text):
    assert smollm2.decode(smollm2.encode(text), skip_special=False) == text


@pytest.mark.weights
def test_smollm2_facts(smollm2):
    assert (smollm2.vocabulary, smollm2.bos_id, smollm2.eos_ids) == (49152, 1, (2,))
    assert smollm2.encode("Hello world") == [19556, 905]
    assert smollm2.encode("2024") == smollm2.encode("2") + smollm2.encode("0") + smollm2.encode("2") + [36]
    prompt = smollm2.chat([{"role": "user", "content": "hi"}])
    assert prompt.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert smollm2.encode(prompt, add_special=False)[0] == 1 and smollm2.encode(prompt).count(2) == 2


@pytest.mark.weights
@pytest.mark.slow
def test_gemma3_is_sentencepiece_bpe():
    metadata_scores, tokenizer = gemma3()
    for text in TEXTS:
        if "<bos>" not in text:
            assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.encode(text)[0] == tokenizer.bos_id == 2
    assert tokenizer.encode("Hello world", add_special=False) == [9259, 1902]
    # In running prose without characters that are not pieces, SentencePiece breaks ties to the left.
    prose = zoo.__doc__.replace("\n", " ").replace("  ", " ")
    expected = naive_bpe(list(prose.replace(" ", "▁")), metadata_scores, lambda pair: (pair[2],))
    assert pieces_of(tokenizer, prose) == expected


def gemma3() -> tuple[dict[str, float], Tokenizer]:
    from kvx.models.readers.gguf import _mapped
    from kvx.models.readers.gguf_header import read_header

    path = zoo.fetch("gemma3-270m")
    metadata = read_header(_mapped(path), path.name).metadata
    columns = (metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type"))
    scores = {token: score for token, score, kind in zip(*columns, strict=True) if kind == NORMAL}
    return scores, built(metadata)
