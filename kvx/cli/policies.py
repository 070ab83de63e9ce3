"""`kvx policies`: the named methods, and what one of them does and takes."""

import inspect
from typing import Annotated

import typer


def policies(
    name: Annotated[str | None, typer.Argument(help="Show this method's formula and parameters.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """List the named policies, or explain one.

    Examples:

        kvx policies

        kvx policies snapkv
    """
    from json import dumps

    from rich.console import Console
    from rich.table import Table

    from kvx.policies import find, names

    if name is not None:
        described = _described(name, find(name))
        if json:
            print(dumps(described, indent=2))
            return
        parameters = ", ".join(
            each["name"] if each["required"] else f"{each['name']}={each['default']}"
            for each in described["parameters"]
        )
        print(f"{name}({parameters})\n\n{described['doc']}")
        return
    rows = {each: _described(each, find(each)) for each in names()}
    if json:
        print(dumps(list(rows.values()), indent=2))
        return
    table = Table("policy", "what it is", box=None, pad_edge=False)
    for each, described in rows.items():
        table.add_row(f"[bold]{each}[/bold]", " ".join(described["doc"].split("\n\n")[0].split()))
    Console().print(table)
    print("\nkvx policies NAME explains one. Chain selections and a store with '+': snapkv(budget=0.25)+kivi(bits=2)")


def _described(name: str, build) -> dict:
    """A method's name, docstring and parameters, as JSON can hold them."""
    parameters = [
        {
            "name": each.name,
            "required": each.default is inspect.Parameter.empty,
            "default": None if each.default is inspect.Parameter.empty else repr(each.default),
            "type": each.annotation
            if isinstance(each.annotation, str)
            else getattr(each.annotation, "__name__", str(each.annotation)),
        }
        for each in inspect.signature(build).parameters.values()
    ]
    return {"name": name, "doc": inspect.getdoc(build) or "", "parameters": parameters}
