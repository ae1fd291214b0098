"""Files of which every byte is known by a digest: what is read of one is what it held when the digests were made.

A run reads its prompts little by little, for hours, from files that somebody may write over meanwhile.
"""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import xxhash

from noria.errors import Changed
from noria.tools.changes import Look, look_of

BLOCK_NBYTES = 2**20  # of a digest of 8 bytes
_KEPT = 8  # blocks that stay in memory: a library reads a column here, a column there
_DIGEST_NBYTES = 8


@dataclass(frozen=True, eq=False)
class Known(os.PathLike[str]):
    """A file as it was: its path, size and hash (XXH3, 128 bits, hex), a digest a block, and how it looked."""

    path: str
    nbytes: int
    hash: str
    digests: bytes
    look: Look

    def __fspath__(self) -> str:
        return self.path

    def __str__(self) -> str:
        return self.path

    def is_same(self) -> bool:
        """Whether the file that has this path now holds the same bytes; it is read again."""
        try:
            with KnownFile(self) as file:
                while file.read(BLOCK_NBYTES):
                    pass
                return os.stat(self.path).st_size == self.nbytes
        except (Changed, OSError):
            return False


def know(path: str) -> Known:
    """Reads a file once. Raises OSError."""
    whole, digests, nbytes = xxhash.xxh3_128(), [], 0
    with open(path, "rb", buffering=0) as file:
        look = look_of(os.fstat(file.fileno()))
        while block := _read(file.fileno(), nbytes, BLOCK_NBYTES):
            whole.update(block)
            digests.append(xxhash.xxh3_64_digest(block))
            nbytes += len(block)
    return Known(path, nbytes, whole.hexdigest(), b"".join(digests), look)


class KnownFile(io.RawIOBase):
    """The bytes of a known file. Reading raises Changed where the file holds others now; `changed` keeps that error."""

    def __init__(self, known: Known):
        self._known, self._place = known, 0
        self._blocks: dict[int, bytes] = {}  # the one that was used last is the last
        self.changed: Changed | None = None
        self._handle = os.open(known.path, os.O_RDONLY | os.O_CLOEXEC)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self._place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._known.nbytes}[whence]
        return self._place

    def readinto(self, buffer: Any, /) -> int:  # a writable buffer, filled as far as the file goes
        view, done = memoryview(buffer).cast("B"), 0
        while done < len(view) and self._place < self._known.nbytes:
            number, start = divmod(self._place, BLOCK_NBYTES)
            piece = self._block(number)[start : start + len(view) - done]
            view[done : done + len(piece)] = piece
            done, self._place = done + len(piece), self._place + len(piece)
        return done

    def _block(self, number: int) -> bytes:
        block = self._blocks.pop(number, None)
        if block is None:
            offset = number * BLOCK_NBYTES
            block = _read(self._handle, offset, min(BLOCK_NBYTES, self._known.nbytes - offset))
            place = number * _DIGEST_NBYTES
            if xxhash.xxh3_64_digest(block) != self._known.digests[place : place + _DIGEST_NBYTES]:
                self.changed = Changed(self._known.path)
                raise self.changed
            if len(self._blocks) >= _KEPT:
                del self._blocks[next(iter(self._blocks))]
        self._blocks[number] = block
        return block

    def close(self) -> None:
        if not self.closed:
            os.close(self._handle)
        super().close()


@contextmanager
def for_library(path: str | os.PathLike[str]) -> Iterator[str | KnownFile]:
    """What a library that reads files itself is given: the path, or an object that gives the bytes of a known file.

    Raises Changed for such a file whatever the library made of it.
    """
    if not isinstance(path, Known):
        yield os.fspath(path)
        return
    with KnownFile(path) as file:
        try:
            yield file
        except BaseException:
            if file.changed is not None:
                raise file.changed from None
            raise


def _read(handle: int, offset: int, nbytes: int) -> bytes:
    """So many bytes, fewer at the file's end."""
    pieces, left = [], nbytes
    while left and (piece := os.pread(handle, left, offset)):
        pieces.append(piece)
        left, offset = left - len(piece), offset + len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)
