"""Rendering an untrusted chat template: in jinja2's sandbox, in a child process with time and memory limits.

A template comes from a downloaded file. The sandbox keeps it from Python's internals, the process limits keep one that
loops or explodes from taking the caller with it.
"""

import json
import os
import subprocess
import sys
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
    if len(template) > MAX_TEMPLATE_CHARACTERS:
        raise BadInput(f"chat template has {len(template)} characters, allowed are {MAX_TEMPLATE_CHARACTERS}")
    try:
        request = json.dumps(
            {"template": template, "variables": dict(variables), "seconds": seconds, "memory": memory}, allow_nan=False
        )
    except (TypeError, ValueError) as error:
        raise BadInput(f"messages hold a value that JSON does not have ({error}), allowed are JSON's types") from None
    try:
        # -P: the script's folder must not shadow modules that the child imports.
        done = subprocess.run(
            [sys.executable, "-P", str(_CHILD)],
            input=request.encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in _PASSED_ON if name in os.environ},
            timeout=seconds + _START_SECONDS,
            check=False,
        )
        answer = json.loads(done.stdout) if done.returncode == 0 else {}
    except (subprocess.TimeoutExpired, ValueError):
        answer = {}
    if "error" in answer:
        raise BadInput(f"chat template cannot be rendered: {' '.join(answer['error'].split())}")
    if "text" not in answer:
        raise BadInput(f"chat template exceeds its limits: allowed are {seconds:g} s and {memory >> 20} MiB")
    return answer["text"]
