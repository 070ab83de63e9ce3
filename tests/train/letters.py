"""A tokenizer for tests of data: a token a character, with begin and end of text, and a chat template."""

from kvx.models.tokenizer import Tokenizer

CHARACTERS = "".join(map(chr, range(32, 127))) + "\n"
BOS, EOS = "<s>", "</s>"
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"  # noqa: E501


def letters(chat: bool = False) -> Tokenizer:
    """Ids 0 and 1 begin and end a text; others are those of the characters."""
    added = [
        {"id": index, "content": token, "special": True, "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False}
        for index, token in enumerate((BOS, EOS))
    ]
    specification = {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "[\\s\\S]"}, "behavior": "Isolated", "invert": False},
        "decoder": {"type": "Fuse"},
        "model": {
            "type": "WordLevel",
            "vocab": {token: index for index, token in enumerate((BOS, EOS, *CHARACTERS))},
            "unk_token": "?",
        },
    }
    special = {"bos_token": BOS, "eos_token": EOS, "add_bos_token": True} | (
        {"chat_template": TEMPLATE} if chat else {}
    )
    return Tokenizer(specification, special)
