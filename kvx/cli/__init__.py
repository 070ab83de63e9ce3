"""The command line, one file per command; heavy imports happen inside the commands."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import typer

from kvx.cli.bench import bench
from kvx.cli.compare import compare
from kvx.cli.distill import distill
from kvx.cli.eval import evaluate
from kvx.cli.fetch import fetch
from kvx.cli.generate import generate
from kvx.cli.heads import heads
from kvx.cli.plan import plan
from kvx.cli.policies import policies
from kvx.cli.search import search
from kvx.errors import BadInput

BAD_INPUT = 2
"""Exit status of input that kvx refuses, with one line on stderr."""

EXTRAS = {"grain": "train", "orbax": "train", "pyarrow": "train", "tensorboardX": "train"}
EXTRAS |= {"optuna": "eval", "jieba": "eval", "huggingface_hub": "hub", "libtpu": "aot"}
"""Packages that some commands need, and the extra of kvx that brings each."""

_STYLE: dict[str, Any] = {
    "add_completion": False, "rich_markup_mode": "markdown", "pretty_exceptions_enable": False,
    "context_settings": {"help_option_names": ["-h", "--help"]},
}  # fmt: skip

app = typer.Typer(
    name="kvx",
    help="KV-cache compression for JAX: which policy keeps quality in the fewest bytes?",
    no_args_is_help=True,
    **_STYLE,
)
for _command in (fetch, generate, compare, policies, plan, search, heads, distill):
    app.command()(_command)
app.command("eval")(evaluate)
app.add_typer(bench, name="bench")

# What click calls UsageError and ClickException, wherever this version of typer keeps them.
_Refusal: Any = typer.BadParameter.__bases__[0].__bases__[0]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit; see `run`."""
    run(app, "kvx", arguments)


def program(*commands: Callable[..., None]) -> typer.Typer:
    """The command line of a module that is run by `python -m`, in the style of kvx's own."""
    app = typer.Typer(**_STYLE)
    for command in commands:
        app.command(context_settings=_STYLE["context_settings"])(command)
    return app


def run(app: typer.Typer, name: str, arguments: Sequence[str] | None = None) -> None:
    """Run a command line and exit.

    Status 0; 2 and one line on stderr for bad input, or for an extra that is not installed; 130 when interrupted.
    Anything else that goes wrong is a bug and keeps its traceback.

    Args:
        name: what it is called by.
        arguments: None: those of the process.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    try:
        status = typer.main.get_command(app).main(given, prog_name=name, standalone_mode=False)
    except BadInput as error:
        sys.exit(_refused(name, str(error)))
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in EXTRAS:
            raise
        sys.exit(_refused(name, f"{missing} is not installed; allowed: pip install kvx[{EXTRAS[missing]}]"))
    except _Refusal as error:
        message = error.format_message()
        if not message.strip() or (not given and app.info.no_args_is_help is True):  # alone it has printed its help
            sys.exit(BAD_INPUT)
        sys.exit(_refused(name, message))
    except (typer.Abort, KeyboardInterrupt):
        print(f"{name}: interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(status if isinstance(status, int) else 0)


def _refused(name: str, message: str) -> int:
    print(f"{name}: error: " + " ".join(message.split()), file=sys.stderr)
    return BAD_INPUT
