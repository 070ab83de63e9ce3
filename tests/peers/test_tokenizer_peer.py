"""Tokens of the GGUF vocabulary equal those of transformers' own conversion of the same file."""

import pytest

from kvx.models import zoo
from kvx.models.readers import read_checkpoint, write_checkpoint
from kvx.models.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.peer, pytest.mark.weights]

TEXTS = [
    "Hello world",
    "  two spaces,\ttab\n\n\nlines \r\n",
    "don't I'll we've 1234567 3.14",
    "héllo naïve ☃ 🙂👩‍👩‍👧 e\u0301",
    "日本語のテキスト 中文 한국어 العربية हिन्दी",
    "def f(x):\n    return x ** 2  # comment\n",
    "<|im_start|>user\nhi<|im_end|>",
]


@pytest.fixture(scope="module")
def checkpoint():
    return read_checkpoint(zoo.fetch("smollm2-135m-instruct"))


def test_a_saved_tokenizer_is_read_by_transformers(checkpoint, tmp_path):
    # Only the tokenizer: one small tensor stands for the weights.
    write_checkpoint(
        tmp_path / "m",
        checkpoint.config,
        {"model.norm.weight": checkpoint.tensors["model.norm.weight"]},
        checkpoint.tokenizer,
        checkpoint.special,
    )
    ours, theirs = Tokenizer.from_checkpoint(checkpoint), transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    for text in TEXTS:
        ids = ours.encode(text)
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == ours.decode(ids, skip_special=False)
    messages = [{"role": "user", "content": "hi"}]
    assert theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == ours.chat(messages)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_ids[0])


def test_tokens_equal_those_of_the_peers_own_conversion(checkpoint):
    path = zoo.fetch("smollm2-135m-instruct")
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ours = Tokenizer.from_checkpoint(checkpoint)
    for text in TEXTS:
        assert ours.encode(text, add_special=False) == theirs(text, add_special_tokens=False)["input_ids"]
