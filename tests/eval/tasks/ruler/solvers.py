"""Solvers of RULER's generated tasks that see a prompt's text only, and parse it as the question says."""

import re
from collections import Counter


def needles(text: str) -> str:
    """The values of the keys that the question names."""
    asked = re.search(r"What (?:is|are all) the special magic \w+ for (.+) mentioned in the provided text\?", text)
    assert asked, "no question"
    keys = re.split(r", and |, ", asked[1])
    found = re.findall(r"One of the special magic \w+ for (.+?) is: (\S+)\.(?:\s|$)", text)
    return ", ".join(value for key, value in found if key in keys)


def chain(text: str) -> str:
    """The variables that come to hold the value, of the last of the texts."""
    text = text[text.rindex("Memorize and track the chain") :]
    asked = re.search(r"Find all variables that are assigned the value (\d+) in", text)
    assert asked, "no question"
    held: dict[str, str] = {}
    for name, by, value in re.findall(r"^VAR (\w+) = (?:VAR (\w+)|(\d+))\s*$", text, re.M):
        assert by in held or value, "assigned before it is known"
        held[name] = held[by] if by else value
    return " ".join(name for name, value in held.items() if value == asked[1])


def listed(text: str) -> Counter[str]:
    """How often each word occurs in the last numbered list before the last question."""
    text = text[text.rindex("Memorize the ones that appear most often.\n") : text.rindex("\nQuestion:")]
    items = re.split(r"(?:^| )\d+\. ", text.split("\n", 1)[1])[1:]
    return Counter(items)


def common(text: str) -> str:
    """The ten most common words of the list."""
    return " ".join(word for word, _ in listed(text).most_common(10))


def coded(text: str) -> Counter[str]:
    """How often each coded word occurs."""
    text = text[text.index("coded words. ") + len("coded words. ") : text.index("\nQuestion:")]
    return Counter(text.split(" "))


def frequent(text: str) -> str:
    """The three most frequent words that are not dots."""
    words = [word for word, _ in coded(text).most_common() if word.strip(".")]
    return " ".join(words[:3])


SOLVERS = {
    **{f"ruler/niah_single_{number}": needles for number in (1, 2, 3)},
    **{f"ruler/niah_multikey_{number}": needles for number in (1, 2, 3)},
    "ruler/niah_multivalue": needles,
    "ruler/niah_multiquery": needles,
    "ruler/vt": chain,
    "ruler/cwe": common,
    "ruler/fwe": frequent,
}
