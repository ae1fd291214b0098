"""Prompts in parquet: a column a key. Needs pyarrow, which the extra noria-mpi[parquet] installs.

Read a batch of rows at a time. Knows no key of a row.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from noria import readers
from noria.errors import InputError, require
from noria.readers import PROMPT_NAMES, AnyPath, BadRow, own_id
from noria.readers._arrow import values

SUFFIXES = (".parquet",)
BATCH_ROWS = 256
MAX_GROUP_NBYTES = 2**30  # a row group's columns, unpacked
_MAX_TEXT = 2**27  # of the file's own description


def read(path: AnyPath, names: Collection[str] = PROMPT_NAMES) -> Iterator[dict[str, Any] | BadRow]:
    """The file's rows, in order; BadRow for one that cannot be read. Raises InputError for a bad file."""
    with _opened(path, names) as file:
        row = 0
        for batch in _batches(file):
            for record in zip(*map(values, batch.columns), strict=True):
                yield _row(dict(zip(batch.schema.names, record, strict=True)), row)
                row += 1


def _batches(file: Any) -> Iterator[Any]:
    """A batch has rows of one group: pyarrow does not put nested dictionaries of several together.

    Raises ValueError for a group that has other rows than it says.
    """
    for group in range(file.metadata.num_row_groups):
        left = file.metadata.row_group(group).num_rows
        for batch in file.iter_batches(BATCH_ROWS, row_groups=[group]):
            yield batch
            left -= batch.num_rows
        if left:
            raise ValueError(f"row group {group} has fewer rows than it says: {left} are missing")


def count(path: AnyPath, names: Collection[str] = PROMPT_NAMES) -> int:
    """The number of rows that `read` gives."""
    with _opened(path, names) as file:
        return file.metadata.num_rows


@contextmanager
def _opened(path: AnyPath, names: Collection[str]) -> Iterator[Any]:
    with readers.opened(path):
        pass
    with readers.for_library(path) as source, _open(source, path, names) as found:
        yield found


@contextmanager
def _open(source: Any, path: AnyPath, names: Collection[str]) -> Iterator[Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(f"prompts {path}: parquet needs pyarrow: pip install pyarrow") from error
    try:
        limits = {"thrift_string_size_limit": _MAX_TEXT, "thrift_container_size_limit": 2**20}
        with parquet.ParquetFile(source, memory_map=False, buffer_size=2**20, pre_buffer=False, **limits) as file:
            _check(file, path, names)
            yield file
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError, KeyError) as error:
        if isinstance(error, InputError):
            raise
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"prompts {path}: cannot be read as parquet ({reason}): it is damaged, or of another kind"
        ) from error


def _check(file: Any, path: AnyPath, wanted: Collection[str]) -> None:
    names = file.schema_arrow.names
    shown = ", ".join(names)[:100]
    require(len(set(names)) == len(names), f"prompts {path}: two columns have the same name: {shown}")
    require(set(names) & set(wanted), f"prompts {path}: {readers.table_without(wanted, names)}")
    groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
    most = max((group.total_byte_size for group in groups), default=0)
    require(
        most <= MAX_GROUP_NBYTES,
        f"prompts {path}: a row group has {most} bytes unpacked, at most {MAX_GROUP_NBYTES}: write it with more groups",
    )
    counted = sum(group.num_rows for group in groups)
    require(
        counted == file.metadata.num_rows and all(group.num_rows >= 0 for group in groups),
        f"prompts {path}: it says that it has {file.metadata.num_rows} rows, its groups have {counted}",
    )


def _row(record: dict[str, Any], row: int) -> dict[str, Any] | BadRow:
    for name, value in record.items():
        if isinstance(value, BadRow):
            return BadRow(f"row {row}: {name[:100]!r} {value.error}", own_id(record.get("id")))
        if isinstance(value, float) and value != value:
            record[name] = None
    return record
