"""A column of a Parquet or an Arrow file as documents; `pyarrow` is needed for these alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvx.errors import BadInput


class Column(Sequence[str | list]):
    """A column of an Arrow table, a row at a time.

    Attributes:
        holds_lists: of messages, not texts.
    """

    def __init__(self, column: Any):
        self._column = column
        self.holds_lists = hasattr(column.type, "value_type")

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, index: int) -> str | list:
        return self._column[index].as_py() or ""


def read_column(path: Path, field: str) -> Column:
    """The documents in a column.

    Args:
        path: .parquet, whose column is read into memory, or .arrow (a stream or a file), which is mapped.
        field: the column: texts, or lists of messages.

    Raises:
        BadInput: `pyarrow` is missing, the file cannot be read, or has no such column.
    """
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ModuleNotFoundError:
        raise BadInput(f"{path} needs the package pyarrow; allowed: pip install 'kvx[train]'") from None
    try:
        if path.suffix.lower() == ".parquet":
            file = parquet.ParquetFile(path)
            _check(path, file.schema_arrow, field, arrow.types)
            return Column(file.read(columns=[field]).column(field))
        table = _mapped(path, arrow)
        _check(path, table.schema, field, arrow.types)
        return Column(table.column(field))
    except (arrow.ArrowException, OSError) as error:
        raise BadInput(f"{path} cannot be read: {str(error).splitlines()[0]}") from None


def _mapped(path: Path, arrow: Any) -> Any:
    """The table of an Arrow file: a stream, as Hugging Face writes it, or a file with a footer."""
    source = arrow.memory_map(str(path))
    try:
        return arrow.ipc.open_stream(source).read_all()
    except arrow.ArrowInvalid:
        return arrow.ipc.open_file(source).read_all()


def _check(path: Path, schema: Any, field: str, types: Any) -> None:
    if field not in schema.names:
        raise BadInput(f"{path} has the columns {sorted(schema.names)}; allowed: one of them is {field!r}")
    kind = schema.field(field).type
    if types.is_string(kind) or types.is_large_string(kind):
        return
    if not (types.is_list(kind) or types.is_large_list(kind)) or not _is_message(kind.value_type, types):
        raise BadInput(
            f"{path}: {field!r} is of type {kind}; allowed: texts, or lists of messages, which have role (a text) and "
            "content"
        )


def _is_message(kind: Any, types: Any) -> bool:
    names = [kind.field(index).name for index in range(kind.num_fields)] if types.is_struct(kind) else []
    role = kind.field(names.index("role")).type if "role" in names and "content" in names else None
    return role is not None and (types.is_string(role) or types.is_large_string(role))
