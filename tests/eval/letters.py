"""A tokenizer of single characters for the small test model: 97 ids, exact both ways."""


class Letters:
    """One id a character; characters it does not know become the last id."""

    has_chat_template = False
    eos_ids = ()

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Ids of a text."""
        return [95 if letter == "\n" else min(max(ord(letter) - 32, 0), 96) for letter in text]

    def decode(self, ids, skip_special: bool = True) -> str:
        """The text of ids."""
        return "".join("\n" if each == 95 else "?" if each == 96 else chr(int(each) + 32) for each in ids)
