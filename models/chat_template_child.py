"""The process that renders untrusted chat templates: a script that reads JSON, limits itself, and writes JSON.

One request from standard input, or, called with "--many", one a line until there are no more, each within the limits.
It imports nothing of kvx, so that it starts in a fraction of a second.
"""

import datetime
import json
import signal
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_OUTPUT_CHARACTERS = 1 << 24


def limit(seconds: float, memory: int) -> None:
    """End this process after `seconds` of wall or processor time; refuse it more than `memory` bytes.

    The timer's default action ends the process even inside one long C call, where no Python handler would run.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    import resource

    # The next request gets as much again, so the hard limit of processor time stays what it is.
    most = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time() + seconds) + 1, most))
    for what, amount in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_AS, memory),
    ):
        try:
            resource.setrlimit(what, (amount, amount))
        except (ValueError, OSError):
            # macOS knows RLIMIT_AS but refuses to set it; the timer still holds there.
            if what != resource.RLIMIT_AS or sys.platform != "darwin":
                raise


class Generation(Extension):
    """The {% generation %} block that marks the assistant's tokens for training: here its content, unmarked."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def environment() -> ImmutableSandboxedEnvironment:
    """Jinja2 as Hugging Face's chat templates expect it."""
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    env.filters["tojson"] = to_json
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = lambda layout: datetime.datetime.now().strftime(layout)
    return env


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without jinja2's escaping of HTML characters, which would change a prompt."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: str) -> None:
    """What templates call to refuse a conversation."""
    raise jinja2.TemplateError(message)


def render(template: str, variables: Mapping[str, Any], most: int = MAX_OUTPUT_CHARACTERS) -> str:
    """The rendered text; ValueError beyond `most` characters."""
    pieces: list[str] = []
    total = 0
    for piece in environment().from_string(template).generate(variables):
        total += len(piece)
        if total > most:
            raise ValueError(f"it writes more than {most} characters")
        pieces.append(piece)
    return "".join(pieces)


def answer(read: Callable[[], str]) -> dict[str, str]:
    """{"text": ...} or {"error": ...}: whatever goes wrong in a template is its own fault."""
    try:
        request = json.loads(read())
        limit(request["seconds"], request["memory"])
        return {"text": render(request["template"], request["variables"])}
    except MemoryError:
        return {"error": "it needs more memory than is allowed"}
    except RecursionError:
        return {"error": "it nests too deeply"}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:300]}


def answer_many() -> None:
    """A line of answer to every line, until standard input ends."""
    for line in sys.stdin:
        found = json.dumps(answer(lambda line=line: line))
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(found, flush=True)


if __name__ == "__main__":
    if "--many" in sys.argv:
        answer_many()
    else:
        sys.stdout.write(json.dumps(answer(sys.stdin.read)))
