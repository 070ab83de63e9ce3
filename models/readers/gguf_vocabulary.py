"""The tokenizer of a GGUF file's metadata, rebuilt as the content of a tokenizer.json.

Two kinds of vocabulary are read. "gpt2": byte-level BPE, merges given, split by the regular expressions that llama.cpp
documents for `tokenizer.ggml.pre`. "llama": SentencePiece BPE, where the pair whose result has the best score merges
first; the merges are rebuilt from the scores. (Reading the latter as a Unigram model, as is often done for Gemma,
gives other tokens.)
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from kvx.errors import BadInput, unknown

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Each text is cut by the first expression, the pieces by the second, and so on.
_SPLITS: dict[str, tuple[str, ...]] = {
    "llama-bpe": (_LLAMA3,),
    "smaug-bpe": (_LLAMA3,),
    "dbrx": (_LLAMA3,),
    "qwen2": (_QWEN2,),
    "deepseek-r1-qwen": (_QWEN2,),
    "smollm": (r"\p{N}", _GPT2),
    "starcoder": (r"\p{N}", _GPT2),
    "refact": (r"\p{N}", _GPT2),
    "command-r": (r"\p{N}", _GPT2),
    "gpt-2": (_GPT2,),
    "mpt": (_GPT2,),
    "olmo": (_GPT2,),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
}
_COMPOSED = ("qwen2", "deepseek-r1-qwen")  # trained on NFC text
_STARTS_WITH_BOS = ("llama-bpe", "smaug-bpe", "dbrx")  # unless the file says otherwise
_WHOLE_WORDS_FIRST = ("llama-bpe",)  # a word that is a token is not built by merges

# A "llama" vocabulary's pieces are split at every character; Gemma 3 has 1.8 million, which give 0.5 million merges.
MAX_PIECE_CHARACTERS = 1 << 22
MAX_PIECE_LENGTH = 512
MAX_MERGES = 1 << 21
# A chat template ends a turn with one of these, which then ends generation beside the stated end of text.
_ENDS_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>")


def rebuild_tokenizer(
    metadata: Mapping[str, Any], vocabulary: int, file: str
) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """The tokenizer specification and special tokens of GGUF metadata.

    Args:
        metadata: of the file.
        vocabulary: rows of the embedding; the token list must have as many.
        file: its name, for refusals.

    Returns:
        The content of tokenizer.json (None if the file has no tokens), and "bos_token", "eos_token", "unk_token",
        "pad_token" as text, "eos_token_ids", "add_bos_token", "chat_template" as far as known.

    Raises:
        BadInput: an unknown tokenizer model or pre-tokenizer; token, score, type lists that disagree; repeated tokens;
            merges of unknown tokens; special ids out of range.
    """
    if "tokenizer.ggml.model" not in metadata or metadata["tokenizer.ggml.model"] == "none":
        return None, {}
    keys = _TokenizerKeys(metadata, vocabulary, file)
    special = keys.special()
    if keys.model == "gpt2":
        return _byte_level(keys, special), special
    return _sentencepiece(keys, special), special


class _TokenizerKeys:
    """The checked lists of a tokenizer's metadata."""

    def __init__(self, metadata: Mapping[str, Any], vocabulary: int, file: str):
        self.metadata = metadata
        self.file = file
        self.model = self.get("model", str)
        if self.model not in ("gpt2", "llama"):
            raise unknown("GGUF tokenizer model", self.model[:80], ("gpt2", "llama"))
        self.tokens: list[str] = self.get("tokens", list)
        if len(self.tokens) != vocabulary:
            raise self.refuse(f"tokenizer.ggml.tokens has {len(self.tokens)} entries, the embedding {vocabulary} rows")
        self.ids = {token: index for index, token in enumerate(self.tokens)}
        if len(self.ids) != len(self.tokens):
            raise self.refuse("tokenizer.ggml.tokens holds a token twice")
        normal = np.full(vocabulary, NORMAL)
        self.types: list[int] = self.numbers("token_type", normal).tolist()
        self.pre: str = self.get("pre", str, "default")
        starts = self.model == "llama" or self.pre in _STARTS_WITH_BOS
        self.add_bos: bool = self.get("add_bos_token", bool, starts)
        self.add_eos: bool = self.get("add_eos_token", bool, False)
        self.add_space_prefix: bool = self.get("add_space_prefix", bool, self.model == "llama")

    def refuse(self, sentence: str) -> BadInput:
        return BadInput(f"GGUF file {self.file!r}: {sentence}")

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        value = self.metadata.get(f"tokenizer.ggml.{key}", default)
        if not isinstance(value, kind):
            found = "missing" if value is None else f"of type {type(value).__name__}"
            raise self.refuse(f"tokenizer.ggml.{key} is {found}, allowed is {kind.__name__}")
        return value

    def numbers(self, key: str, default: np.ndarray | None = None) -> np.ndarray:
        values = self.get(key, np.ndarray, default)
        if len(values) != len(self.tokens):
            raise self.refuse(f"tokenizer.ggml.{key} has {len(values)} entries, there are {len(self.tokens)} tokens")
        return values

    def token_id(self, key: str) -> int | None:
        value = self.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(self.tokens):
            most = len(self.tokens) - 1
            raise self.refuse(f"tokenizer.ggml.{key}_token_id is {str(value)[:80]}, allowed are 0 to {most}")
        return value

    def special(self) -> dict[str, Any]:
        special: dict[str, Any] = {"add_bos_token": self.add_bos}
        for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
            if (index := self.token_id(theirs)) is not None:
                special[f"{ours}_token"] = self.tokens[index]
        template = self.metadata.get("tokenizer.chat_template")
        if isinstance(template, str):
            special["chat_template"] = template
        ends = [self.token_id("eos"), self.token_id("eot"), self.token_id("eom")]
        for text in _ENDS_OF_TURN:
            if isinstance(template, str) and text in template and text in self.ids:
                ends.append(self.ids[text])
        special["eos_token_ids"] = list(dict.fromkeys(index for index in ends if index is not None))
        return special

    def added(self) -> list[dict[str, Any]]:
        """Tokens that are cut out of the raw text before anything else."""
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        return [
            {"id": index, "content": self.tokens[index], **plain, "special": kind != USER_DEFINED}
            for index, kind in enumerate(self.types)
            if kind in (CONTROL, USER_DEFINED, UNKNOWN) and self.tokens[index]
        ]


def _byte_level(keys: _TokenizerKeys, special: Mapping[str, Any]) -> dict[str, Any]:
    if keys.pre not in _SPLITS:
        raise unknown("GGUF pre-tokenizer", keys.pre[:80], _SPLITS)
    merges = []
    for index, merge in enumerate(keys.get("merges", list)):
        # The first character belongs to the left token even if it is a blank.
        head, _, right = merge[1:].partition(" ")
        left = merge[:1] + head
        if left not in keys.ids or right not in keys.ids or left + right not in keys.ids:
            raise keys.refuse(f"merge {index} ({merge[:80]!r}) names or yields a token that is not in the vocabulary")
        merges.append([left, right])
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    splits = [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
        for regex in _SPLITS[keys.pre]
    ]
    return _specification(
        keys,
        special,
        normalizer={"type": "NFC"} if keys.pre in _COMPOSED else None,
        pre_tokenizer={"type": "Sequence", "pretokenizers": [*splits, byte_level]},
        decoder=byte_level,
        model={
            "unk_token": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": keys.pre in _WHOLE_WORDS_FIRST,
            "merges": merges,
        },
    )


def _sentencepiece(keys: _TokenizerKeys, special: Mapping[str, Any]) -> dict[str, Any]:
    to_marks = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    normalizer = to_marks
    if keys.add_space_prefix:
        normalizer = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, to_marks]}
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return _specification(
        keys,
        special,
        normalizer=normalizer,
        pre_tokenizer=None,
        decoder={"type": "Sequence", "decoders": decoders},
        model={
            "unk_token": special.get("unk_token"),
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "merges": merges_by_score(keys.tokens, keys.numbers("scores"), keys.types, keys.file),
        },
    )


def merges_by_score(tokens: list[str], scores: np.ndarray, types: list[int], file: str) -> list[tuple[str, str]]:
    """The merges of a SentencePiece BPE vocabulary, best first.

    SentencePiece has no merge list: of all neighbours whose concatenation is a token, the pair with the highest score
    merges, the leftmost in a tie. As a ranked list: every split of a token into two tokens, ordered by the token's
    score, then by the ids of the halves (the order of Hugging Face's own conversion). Control, byte and user-defined
    tokens take no part in merging.

    Raises:
        BadInput: scores that are not finite, pieces so long or merges so many that no real vocabulary has them.
    """
    if not np.isfinite(scores).all():
        raise BadInput(f"GGUF file {file!r}: tokenizer.ggml.scores holds a value that is not finite")
    pieces = {token: index for index, token in enumerate(tokens) if types[index] == NORMAL}
    total, longest = sum(map(len, pieces)), max(map(len, pieces), default=0)
    if total > MAX_PIECE_CHARACTERS or longest > MAX_PIECE_LENGTH:
        raise BadInput(
            f"GGUF file {file!r}: tokenizer.ggml.tokens has {total} characters, the longest token {longest}; "
            f"allowed are {MAX_PIECE_CHARACTERS} and {MAX_PIECE_LENGTH}"
        )
    merges = []
    for rank in np.argsort(-scores, kind="stable").tolist():
        token = tokens[rank]
        if types[rank] != NORMAL or len(token) < 2:
            continue
        halves = [
            (left, right)
            for cut in range(1, len(token))
            if (left := pieces.get(token[:cut])) is not None and (right := pieces.get(token[cut:])) is not None
        ]
        merges.extend((tokens[left], tokens[right]) for left, right in sorted(halves))
        if len(merges) > MAX_MERGES:
            raise BadInput(f"GGUF file {file!r}: its tokens give more than {MAX_MERGES} merges, the most allowed")
    return merges


def _specification(
    keys: _TokenizerKeys, special: Mapping[str, Any], *, normalizer: Any, pre_tokenizer: Any, decoder: Any, model: Any
) -> dict[str, Any]:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": keys.added(),
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": _ends(keys, special),
        "decoder": decoder,
        "model": {
            "type": "BPE",
            "dropout": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            **model,
            "vocab": keys.ids,
        },
    }


def _ends(keys: _TokenizerKeys, special: Mapping[str, Any]) -> dict[str, Any] | None:
    """The post-processor that puts begin- and end-of-text tokens around a text, or None."""
    single: list[dict[str, Any]] = [{"Sequence": {"id": "A", "type_id": 0}}]
    names = []
    for wanted, name in ((keys.add_bos, "bos_token"), (keys.add_eos, "eos_token")):
        if not wanted:
            continue
        if name not in special:
            raise keys.refuse(f"tokenizer.ggml.add_{name} is set, but the file does not say which token that is")
        names.append(special[name])
        piece = {"SpecialToken": {"id": special[name], "type_id": 0}}
        single = [piece, *single] if name == "bos_token" else [*single, piece]
    if not names:
        return None
    tokens = {name: {"id": name, "ids": [keys.ids[name]], "tokens": [name]} for name in names}
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens}
