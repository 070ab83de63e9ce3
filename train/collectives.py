"""What a compiled program sends between chips: collectives by kind, how often each runs, and what bytes it yields.

The TPU compiler writes a collective that runs beside other work several times: where it starts, into each fusion that
it runs beside, and where it is done. All of these name the same channel.
"""

import math
import re
from collections import defaultdict
from dataclasses import dataclass

KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter", "ragged-all-to-all")
BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2}
BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "f8e4m3fn": 1, "f8e5m2": 1}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) (?:\(.*\) -> .*)?\{\s*$")
_OPERATION = re.compile(rf"= (\(?.*?\)?) ({'|'.join(KINDS)})(-start)?\(")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation|async_computation)=%?([\w.-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TURNS = re.compile(r'"known_trip_count":\s*\{"n":\s*"(\d+)"')
_CONDITION = re.compile(r"condition=%?([\w.-]+)")
_CONSTANT = re.compile(r"%?([\w.-]+) = s32\[\]\S* constant\((\d+)\)")
_BELOW = re.compile(r"ROOT .* compare\(.*?%([\w.-]+)\), direction=LT")
_CHAINED = re.compile(r"channel_id=(\d+).*chain_id=")


@dataclass(frozen=True)
class Traffic:
    """Of one kind of collective, on one chip.

    Attributes:
        count: how many times one runs in a step, loops counted by their turns.
        bytes: of the arrays that they yield, in all.
    """

    count: int
    bytes: int


def traffic(text: str) -> dict[str, Traffic]:
    """Collectives of a program by kind.

    Args:
        text: `compiled.as_text()`. Where the compiler does not state the turns of a loop, one that goes on while a
            number is below a constant is taken to count from 0 by one, as scans do; any other loop counts once.
    """
    entry, bodies = _computations(text)
    counts: dict[str, int] = defaultdict(int)
    total: dict[str, float] = defaultdict(float)
    chained: set[tuple[str, str]] = set()
    for name, times in _times(entry, bodies).items():
        for line in bodies[name]:
            if found := _OPERATION.search(line):
                shape, kind, start = found.groups()
                if channel := _CHAINED.search(line):
                    if (kind, channel[1]) in chained:
                        continue
                    chained.add((kind, channel[1]))
                counts[kind] += times
                total[kind] += times * _yielded(shape, kind, bool(start))
    return {kind: Traffic(counts[kind], round(total[kind])) for kind in sorted(counts)}


def _computations(text: str) -> tuple[str, dict[str, list[str]]]:
    entry, bodies, lines = "", {}, []
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            lines = bodies[found[2]] = []
            entry = found[2] if found[1] else entry
        elif line.strip() != "}":
            lines.append(line)
    return entry, bodies


def _times(entry: str, bodies: dict[str, list[str]]) -> dict[str, int]:
    """How often each computation runs, callers before the called."""
    times: dict[str, int] = defaultdict(int)

    def visit(name: str, count: int) -> None:
        times[name] += count
        for line in bodies[name]:
            inner = count * _turns(line, bodies) if " while(" in line else count
            called = _CALLED.findall(line)
            if branches := _BRANCHES.search(line):
                called += re.findall(r"[\w.-]+", branches[1])
            for each in called:
                if each in bodies:
                    visit(each, inner)

    visit(entry, 1)
    return times


def _turns(loop: str, bodies: dict[str, list[str]]) -> int:
    if stated := _TURNS.search(loop):
        return int(stated[1])
    condition = _CONDITION.search(loop)
    lines = bodies.get(condition[1], []) if condition else []
    constants = {found[1]: int(found[2]) for line in lines if (found := _CONSTANT.search(line))}
    below = next((found[1] for line in lines if (found := _BELOW.search(line))), None)
    return 1 if below is None else constants.get(below, 1)


def _yielded(shape: str, kind: str, started: bool) -> float:
    """Bytes of a result; a collective that was started says its operands first, but for a reduction in place."""
    parts = _parts(shape) if started and kind != "all-reduce" else [shape]
    found = _SHAPE.findall(parts[1] if len(parts) > 1 else shape)
    sizes = (math.prod(int(size) for size in dims.split(",") if size) for _, dims in found)
    return float(sum(BYTES.get(width, 4) * size for (width, _), size in zip(found, sizes, strict=True)))


def _parts(shape: str) -> list[str]:
    """The members of a tuple, as text; of anything else, itself."""
    if not shape.startswith("("):
        return [shape]
    parts, depth = [""], 0
    for letter in shape[1:-1]:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return parts
