"""Rendering an untrusted chat template: in jinja2's sandbox, in a child process with time and memory limits.

A template comes from a downloaded file. The sandbox keeps it from Python's internals, the process limits keep one that
loops or explodes from taking the caller with it.
"""

import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvx.errors import BadInput

SECONDS = 2.0
MEMORY = 512 << 20
MAX_TEMPLATE_CHARACTERS = 1 << 20
# Starting an interpreter on a busy machine is no fault of the template; its own clock starts after the imports.
_START_SECONDS = 30.0
_CHILD = Path(__file__).with_name("chat_template_child.py")
# -P: the script's folder must not shadow modules that the child imports.
_COMMAND = (sys.executable, "-P", str(_CHILD))
_PASSED_ON = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "SYSTEMROOT", "TZ")


def render_chat(template: str, variables: Mapping[str, Any], seconds: float = SECONDS, memory: int = MEMORY) -> str:
    """Render a chat template.

    Args:
        template: jinja2 source, with what Hugging Face's templates use: `raise_exception`, `strftime_now`, `tojson`,
            loop controls, blocks trimmed.
        variables: JSON-able: `messages`, `add_generation_prompt`, `bos_token`, ...
        seconds: wall and processor time that the rendering may take.
        memory: address space of the rendering process, in bytes.

    Raises:
        BadInput: a template that is too long, fails, refuses the messages, or exceeds a limit.
    """
    request = _request(template, variables, seconds, memory)
    try:
        done = subprocess.run(
            _COMMAND,
            input=request,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_environment(),
            timeout=seconds + _START_SECONDS,
            check=False,
        )
        answer = done.stdout if done.returncode == 0 else b""
    except subprocess.TimeoutExpired:
        answer = b""
    return _text(answer, seconds, memory)


class ChatRenderer:
    """Renders as `render_chat` does, many times in one child process; a template that exceeds a limit ends it.

    For pipelines over conversations, where a process for each would take most of the time. Threads may share it.
    """

    def __init__(self, seconds: float = SECONDS, memory: int = MEMORY):
        self._seconds, self._memory = seconds, memory
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None

    def __call__(self, template: str, variables: Mapping[str, Any]) -> str:
        """See `render_chat`."""
        request = _request(template, variables, self._seconds, self._memory)
        with self._lock:
            if self._child is None:
                self._child = _started(self)
            answer = _asked(self._child, request)
            if not answer:  # the next call starts another
                _ended(self._child)
                self._child = None
        return _text(answer, self._seconds, self._memory)


def _started(renderer: ChatRenderer) -> "subprocess.Popen[bytes]":
    """A child that lives no longer than its renderer."""
    pipe = subprocess.PIPE
    child = subprocess.Popen(
        [*_COMMAND, "--many"], stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, env=_environment()
    )
    weakref.finalize(renderer, _ended, child)
    return child


def _asked(child: "subprocess.Popen[bytes]", request: bytes) -> bytes:
    """The child's answer, which its own clock sees to; nothing if that ended it."""
    assert child.stdin is not None and child.stdout is not None, "both are pipes"
    try:
        child.stdin.write(request + b"\n")
        child.stdin.flush()
    except BrokenPipeError:
        return b""
    return child.stdout.readline()


def _ended(child: "subprocess.Popen[bytes]") -> None:
    child.kill()
    child.communicate()


def _request(template: str, variables: Mapping[str, Any], seconds: float, memory: int) -> bytes:
    if len(template) > MAX_TEMPLATE_CHARACTERS:
        raise BadInput(f"chat template has {len(template)} characters, allowed are {MAX_TEMPLATE_CHARACTERS}")
    try:
        request = {"template": template, "variables": dict(variables), "seconds": seconds, "memory": memory}
        return json.dumps(request, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise BadInput(f"messages hold a value that JSON does not have ({error}), allowed are JSON's types") from None


def _environment() -> dict[str, str]:
    return {name: os.environ[name] for name in _PASSED_ON if name in os.environ}


def _text(answer: bytes, seconds: float, memory: int) -> str:
    try:
        found = json.loads(answer)
    except ValueError:
        found = {}
    if "error" in found:
        raise BadInput(f"chat template cannot be rendered: {' '.join(found['error'].split())}")
    if "text" not in found:
        raise BadInput(f"chat template exceeds its limits: allowed are {seconds:g} s and {memory >> 20} MiB")
    return found["text"]
