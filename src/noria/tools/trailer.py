"""A checksum of an HDF5 file behind its end, where HDF5 does not look: compared before HDF5 opens the file.

It covers the whole file but for holes: numbers that have a checksum of their own and are no matter of HDF5's. A program
that changes the file by HDF5 cuts it off with what it writes; then the file has none.
"""

import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import xxhash

_END = struct.Struct("<8sQQ16s")  # magic, number of holes, bytes before the table of holes, digest
_MAGIC = b"NoriaSum"
_PIECE_NBYTES = 4 << 20
_MAX_HOLES = 2**16
Hole = tuple[int, int]  # bytes from .. to, not itself


def with_trailer(content: bytes) -> bytes:
    """A file's bytes, and behind them a checksum of all."""
    end = len(content).to_bytes(8, "little")
    digest = xxhash.xxh3_128()
    digest.update(content)
    digest.update(end)
    return content + _END.pack(_MAGIC, 0, len(content), digest.digest())


def append_trailer(path: Path, holes: Sequence[Hole] = ()) -> None:
    """Writes the checksum of all but the holes, which may touch, behind the file. The caller syncs it."""
    table = b"".join(struct.pack("<QQ", *hole) for hole in _joined(holes))
    with path.open("r+b") as file:
        nbytes = file.seek(0, os.SEEK_END)
        digest = _digest(file, nbytes, table)
        file.seek(nbytes)
        file.write(table + _END.pack(_MAGIC, len(table) // 16, nbytes, digest))


def agrees(path: Path) -> bool | None:
    """Whether the file is as it was written, its holes left out; None if it has no checksum. Raises OSError."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - _END.size, 0))
        end = file.read(_END.size)
        if len(end) < _END.size or not end.startswith(_MAGIC):
            return None
        _, num_holes, nbytes, digest = _END.unpack(end)
        if num_holes > _MAX_HOLES or nbytes + 16 * num_holes + _END.size != size:
            return False
        file.seek(nbytes)
        return digest == _digest(file, nbytes, file.read(16 * num_holes))


def _digest(file: BinaryIO, nbytes: int, table: bytes) -> bytes:
    digest = xxhash.xxh3_128()
    for begin, end in _between(table, nbytes):
        file.seek(begin)
        while begin < end and (piece := file.read(min(_PIECE_NBYTES, end - begin))):
            digest.update(piece)
            begin += len(piece)
    digest.update(table + nbytes.to_bytes(8, "little"))
    return digest.digest()


def _between(table: bytes, nbytes: int) -> Iterator[Hole]:
    """What is no hole, in order."""
    at = 0
    for begin, end in struct.iter_unpack("<QQ", table):
        yield at, min(begin, nbytes)
        at = max(at, end)
    yield at, nbytes


def _joined(holes: Sequence[Hole]) -> list[Hole]:
    """The holes in order, those that touch as one."""
    joined: list[Hole] = []
    for begin, end in sorted(holes):
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((begin, end))
    return joined
