"""The ids of rows: what may be one, and which rows have it already, in 8 bytes an id."""

from typing import Any

import numpy as np
import xxhash

from noria.sampling import whole
from noria.tools.text import short, storable


class Ids:
    """The ids so far, as 8-byte hashes: those of this file, and those of earlier files."""

    def __init__(self) -> None:
        self._ours, self._earlier = _Hashes(), _Hashes()
        self._file: str | None = None

    def next_file(self, name: str) -> None:
        self._earlier.join(self._ours)
        self._ours, self._file = _Hashes(), name

    def add(self, id: str) -> bool:
        """False if the id was there already."""
        digest = xxhash.xxh3_64_intdigest(id.encode())
        return digest not in self._earlier and self._ours.add(digest)

    def with_file(self, id: str) -> str | None:
        """Another id for one that an earlier file has; None if it is this file that has it twice."""
        ours = self._file is None or xxhash.xxh3_64_intdigest(id.encode()) in self._ours
        return None if ours else f"{self._file}:{id}"


class _Hashes:
    """Hashes: recent ones in a set, the others in one sorted array."""

    def __init__(self) -> None:
        self._recent: set[int] = set()
        self._sorted = np.empty(0, np.uint64)

    def __contains__(self, digest: int) -> bool:
        place = self._sorted.searchsorted(np.uint64(digest))
        return digest in self._recent or bool(place < len(self._sorted) and int(self._sorted[place]) == digest)

    def add(self, digest: int) -> bool:
        """False if the hash was there already."""
        if digest in self:
            return False
        self._recent.add(digest)
        if len(self._recent) > 2**16:
            self.join(_Hashes())
        return True

    def join(self, other: "_Hashes") -> None:
        """Takes over the hashes of another."""
        recent = np.fromiter(self._recent | other._recent, np.uint64)
        self._sorted = np.sort(np.concatenate([self._sorted, other._sorted, recent]))
        self._recent.clear()


def id_of(row: int, value: Any, ids: Ids) -> tuple[str, str | None, tuple[str, ...]]:
    """The row's id, what is wrong with it, and what is noted. Without one it is the row's number, whatever ids there are."""
    if value is None:
        return str(row), None, ()
    value = whole(value)
    if isinstance(value, bool) or not isinstance(value, str | int):
        return str(row), f"id is {short(value)}: it must be a string or an integer", ()
    id = storable(str(value))
    if ids.add(id):
        return id, None, ()
    longer = ids.with_file(id)
    if longer is None or not ids.add(longer):
        return id, f"id {short(id)} is that of an earlier row too", ()
    return longer, None, ("ids that an earlier file also has are written as FILE:id",)
