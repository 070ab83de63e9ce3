"""Text tokenised once, for corpora beyond memory and machines without the tokenizer: documents end to end in a file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import grain
import numpy as np
import typer

from kvx.cli import program, run
from kvx.errors import BadInput
from kvx.train.data.documents import open_documents
from kvx.train.data.encoding import Encoding
from kvx.train.data.stream import TOKENISING
from kvx.train.data.token_file import ends_file


def tokenise(documents: Sequence[Any], encoding: Encoding, out: Path) -> tuple[int, np.dtype]:
    """Write the ids of documents one after the other, in the machine's byte order, and where each ends.

    Args:
        documents: in this order; empty ones are left out.
        out: a file, which appears under its name complete or not at all, with OUT.ends beside it.

    Returns:
        How many ids, and their dtype: uint16 where the vocabulary fits, uint32 otherwise.

    Raises:
        BadInput: a file that cannot be written.
    """
    dtype = np.dtype(np.uint16 if encoding.vocabulary <= 1 << 16 else np.uint32)
    partial, beside = (path.with_name(f".{path.name}.partial") for path in (out, ends_file(out)))
    ends, count = [], 0
    encoded = grain.MapDataset.source(documents).map(encoding).to_iter_dataset(TOKENISING)
    try:
        with open(partial, "wb") as file:
            for ids in encoded:
                file.write(ids.astype(dtype).tobytes())
                count += len(ids)
                if len(ids):
                    ends.append(count)
        with open(beside, "wb") as file:
            np.save(file, np.asarray(ends, np.int64))
        beside.replace(ends_file(out))
        partial.replace(out)
    except OSError as error:
        raise BadInput(f"out={str(out)!r} cannot be written: {error.strerror or error}") from None
    finally:
        for path in (partial, beside):
            path.unlink(missing_ok=True)
    return count, dtype


def _command(
    model: Annotated[str, typer.Argument(help="Whose tokenizer: a zoo name, a directory, a .gguf file, a hub id.")],
    out: Annotated[Path, typer.Argument(help="The file to write, .bin.")],
    paths: Annotated[list[str], typer.Argument(help="Files or folders, as a job's data.train.")],
    field: Annotated[str, typer.Option(help="Of a row: a text, or messages.")] = "text",
) -> None:
    """Tokenise texts into a .bin file for `data.train` or `data.held_out`.

    Examples:

        python -m kvx.train.data.tokenise smollm2-135m-instruct train.bin texts/

        python -m kvx.train.data.tokenise smollm2-135m-instruct chats.bin chats.jsonl.gz --field messages
    """
    from kvx.models.readers import read_checkpoint
    from kvx.models.tokenizer import Tokenizer
    from kvx.models.zoo import resolve

    if out.suffix != ".bin":
        raise BadInput(f"out={str(out)!r}; allowed: a name that ends with .bin")
    documents = open_documents(paths, "paths", field=field)
    encoding = Encoding.of(Tokenizer.from_checkpoint(read_checkpoint(resolve(model))))
    count, dtype = tokenise(documents, encoding, out)
    print(f'{out}: {count} tokens of {len(documents)} documents; in a job: tokens_dtype = "{dtype}"')


app = program(_command)

if __name__ == "__main__":
    run(app, "python -m kvx.train.data.tokenise")
