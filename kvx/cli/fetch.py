"""`kvx fetch`: download a model of the zoo into the user's cache folder."""

from typing import Annotated

import typer


def fetch(
    model: Annotated[str, typer.Argument(help="A zoo model, or a Hugging Face hub id.")] = "smollm2-135m-instruct",
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    list_: Annotated[bool, typer.Option("--list", help="List the zoo and fetch nothing.")] = False,
) -> None:
    """Fetch a model, checked against its pinned SHA-256, and print where it lies.

    Examples:

        kvx fetch

        kvx fetch gemma3-270m

        kvx fetch --list
    """
    from json import dumps

    from kvx.models import zoo

    if list_:
        rows = [
            {"model": name, "bytes": zoo.MODELS[name].size, "licence": zoo.MODELS[name].licence} for name in zoo.names()
        ]
        print(
            dumps(rows, indent=2)
            if json
            else "\n".join(f"{row['model']}  {row['bytes'] / 1e6:.0f} MB  {row['licence']}" for row in rows)
        )
        return
    path = zoo.resolve(model)
    print(dumps({"model": model, "path": str(path)}, indent=2) if json else path)
