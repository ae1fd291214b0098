"""What is said of a file that is no HDF5 file, or one that is damaged."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from noria.errors import InputError

SIGNATURE = b"\x89HDF\r\n\x1a\n"
# What h5py raises on broken metadata.
DAMAGED = (OSError, RuntimeError, KeyError, ValueError, TypeError, OverflowError, MemoryError, RecursionError)


@contextmanager
def damaged_is_input_error(path: Path) -> Iterator[None]:
    """What h5py raises on broken metadata, as an InputError that names the file."""
    try:
        yield
    except InputError:
        raise
    except DAMAGED as error:
        raise InputError(f"{path} is damaged: {type(error).__name__} {str(error)[:200]!r}") from error


def has_signature(path: str | os.PathLike[str]) -> bool:
    """Whether HDF5 would take the file for one of its own: it looks at bytes 0, 512, 1024, 2048, ... Raises OSError."""
    with open(path, "rb") as file:
        size, place = file.seek(0, os.SEEK_END), 0
        while place < size:
            file.seek(place)
            if file.read(len(SIGNATURE)) == SIGNATURE:
                return True
            place = 2 * place or 512
    return False


def what_it_is(path: Path, error: Exception) -> str:
    """In words, what kind of file lies there that is not a Noria output that opens."""
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as problem:
        return f"a file that cannot be read ({(problem.strerror or str(problem)).lower()})"
    if not start:
        return "an empty file"
    if start.startswith(SIGNATURE):
        return f"an HDF5 file that does not open, cut off or damaged ({error})"
    kinds = (
        (b"\x1f\x8b", "a gzip file"),
        (b"PK\3\4", "a zip file"),
        (b"PAR1", "a parquet file"),
        (b"\x7fELF", "a program"),
    )
    for magic, kind in kinds:
        if start.startswith(magic):
            return kind
    text = start.decode("utf-8", "ignore")
    if text.isprintable() or text.replace("\n", "").replace("\t", "").replace("\r", "").isprintable():
        return f"a text file that begins with {text[:24]!r}"
    return f"a file that begins with the bytes {start[:8].hex(' ')}"
