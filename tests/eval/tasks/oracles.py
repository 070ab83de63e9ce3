"""Solvers of the generated tasks that see a prompt's text and nothing else: each must score 1 on every question."""

import json
import re
from collections import defaultdict
from collections.abc import Callable


def passkey(prompt: str) -> str:
    """The number that the sentence names."""
    return _only(re.findall(r"The pass key is (\d+)\. Remember it\.", prompt))


def key_value(prompt: str) -> str:
    """Parse the object as JSON, and look the key up."""
    whole = json.loads(prompt[prompt.index("{") : prompt.index("}") + 1])
    return whole[_only(re.findall(r'\nKey: "(.+?)"\n', prompt))]


def many_shot(prompt: str) -> str:
    """The one label that all items share which hold one of the new item's words."""
    *shots, asked = re.findall(r"Item: (.+)\nLabel:(.*)", prompt)
    labels = defaultdict(list)
    for item, label in shots:
        for word in item.split():
            labels[word].append(label.strip())
    seen = [labels[word] for word in asked[0].split()]
    return _only(each[0] for each in seen if len(set(each)) == 1)


def copy(prompt: str) -> str:
    """The words as they stand in the list."""
    return _only(re.findall(r"The list of words is: (.+?)\.", prompt))


def reverse(prompt: str) -> str:
    """The words from the end of the list."""
    return " ".join(copy(prompt).split()[::-1])


def variable_tracking(prompt: str) -> str:
    """Follow the assignments in their order."""
    value = _only(re.findall(r"Find all variables that hold the value (\d+)", prompt))
    held: dict[str, str] = {}
    for name, of in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", prompt):
        held[name] = held.get(of, of)
    return ", ".join(name for name in held if held[name] == value)


def needle(prompt: str) -> str:
    """The sentence."""
    return _only(re.findall(r"The best thing to do in San Francisco is (eat .+?\.)", prompt))


def fact(prompt: str) -> str:
    """Where the person of the question left the thing."""
    name, thing = _only(re.findall(r"Where did (\w+) leave the (\w+)\?", prompt))
    return _only(re.findall(rf"{name} left the {thing} in the (\w+)\.", prompt))


def mixed(prompt: str) -> str:
    """By the kind of the question."""
    key = re.search(r'What is the value of the key "(\w+)"\?', prompt)
    return fact(prompt) if key is None else _only(re.findall(rf'The value of "{key[1]}" is "(\w+)"\.', prompt))


def prefix_suffix(prompt: str) -> str:
    """The one line that begins and ends so."""
    first, last = _only(re.findall(r"begins with (\w+) and ends with (\w+)\?", prompt))
    return _only(re.findall(rf"^{first}\w+{last}$", prompt, re.MULTILINE))


def find_number(prompt: str) -> str:
    """Sort the numbers, and take the one that is asked for."""
    listed = _only(re.findall(r"^[\d, ]+\.$", prompt, re.MULTILINE))
    numbers = sorted(int(number) for number in listed.rstrip(".").split(", "))
    asked = _only(re.findall(r"What is the (.+?) number in the list", prompt))
    places = {"smallest": 0, "second smallest": 1, "median": len(numbers) // 2, "second largest": -2, "largest": -1}
    return str(numbers[places[asked]])


def arithmetic(prompt: str) -> str:
    """Do the sum of the last question."""
    return f"It is {_sum(re.findall(r'Question: (.+)', prompt)[-1])}."


def long_arithmetic(prompt: str) -> str:
    """Do the sums of all numbered questions; the opening has said "Answer 1:"."""
    asked = re.findall(r"Question (\d+): (.+)", prompt)
    return "\n".join(f"Answer {number}: {_sum(text)}" for number, text in asked).removeprefix("Answer 1:")


ORACLES: dict[str, Callable[[str], str]] = {
    "passkey": passkey,
    "key_value": key_value,
    "many_shot": many_shot,
    "copy": copy,
    "reverse": reverse,
    "variable_tracking": variable_tracking,
    "needle": needle,
    "needle_facts": fact,
    "arithmetic": arithmetic,
    "long_arithmetic": long_arithmetic,
    "shared/key_value": key_value,
    "shared/many_shot": many_shot,
    "shared/variable_tracking": variable_tracking,
    "shared/needle_facts": fact,
    "shared/prefix_suffix": prefix_suffix,
    "shared/find_number": find_number,
    "shared/mixed": mixed,
}
"""By the task's name."""


def _only(found):
    """What must be there, and once."""
    (one,) = found
    return one


def _sum(text: str) -> int:
    value = int(_only(re.findall(r"Start with (\d+)\.", text)))
    for word, amount in re.findall(r"(Add|Subtract|Multiply by) (\d+)\.", text):
        value = {"Add": value + int(amount), "Subtract": value - int(amount), "Multiply by": value * int(amount)}[word]
    return value
