"""Texts of a column, read from the heaps in which HDF5 keeps them (HDF5 file format, III.E), without HDF5.

HDF5 may read a damaged heap for ever. Here nothing is read twice, no size is believed, and what is wrong is named.
"""

import os
import struct
from pathlib import Path

import h5py
import numpy as np
from h5py import h5d

from noria.errors import InputError

_REFERENCE = np.dtype([("nbytes", "<u4"), ("heap", "<u8"), ("number", "<u4")])
REFERENCE_NBYTES = _REFERENCE.itemsize
_HEAP, _OBJECT = struct.Struct("<4sB3xQ"), struct.Struct("<HHxxxxQ")
_FIRST_NBYTES = 4096  # of a heap of short texts, which HDF5 makes as long
MAX_HEAP_NBYTES = 2**30  # one that is longer than its default holds one text
Heap = dict[int, tuple[int, int]]  # number of a text -> where it lies in the heap, bytes


class Texts:
    """A column of texts of any length in an open file: its slices are arrays of bytes, as h5py gives them."""

    def __init__(self, dataset: h5py.Dataset, fd: int, path: Path):
        self._name, self._fd, self._path = dataset.name, fd, path
        self._offset, self._num_rows = dataset.id.get_offset() or 0, len(dataset)
        self._file_nbytes = os.fstat(fd).st_size

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(self._num_rows)
        num = max(stop - start, 0)
        content = self._read(self._offset + start * _REFERENCE.itemsize, num * _REFERENCE.itemsize)
        references = np.frombuffer(content, _REFERENCE)
        texts = np.full(num, b"", object)
        here, heap, content = -1, Heap(), b""
        for place in np.flatnonzero(references["nbytes"]).tolist():
            nbytes, address, number = references[place].item()
            if address != here:
                content = self._heap(address)
                here, heap = address, _objects(content)
            begin, size = heap.get(number, (0, 0))
            if nbytes > size:
                raise self._damaged(f"text {start + place} of {nbytes} bytes is not in its heap at byte {address}")
            texts[place] = content[begin : begin + nbytes]
        return texts

    def _heap(self, address: int) -> bytes:
        beginning = self._read(address, min(_FIRST_NBYTES, max(self._file_nbytes - address, 0)))
        magic, version, nbytes = _HEAP.unpack_from(beginning.ljust(_HEAP.size, b"\0"))
        if (magic, version) != (b"GCOL", 1) or not _HEAP.size <= nbytes <= MAX_HEAP_NBYTES:
            raise self._damaged(f"there is no heap of texts at byte {address}")
        rest = nbytes - len(beginning)
        return beginning[:nbytes] if rest <= 0 else beginning + self._read(address + len(beginning), rest)

    def _read(self, offset: int, nbytes: int) -> bytes:
        """So many bytes of the file. Raises InputError where it has fewer."""
        if not 0 <= offset <= self._file_nbytes - nbytes:
            raise self._damaged(f"byte {offset + nbytes} lies behind the {self._file_nbytes} of the file")
        pieces = []
        while nbytes and (piece := os.pread(self._fd, min(nbytes, 2**30), offset)):
            pieces.append(piece)
            offset, nbytes = offset + len(piece), nbytes - len(piece)
        if nbytes:
            raise self._damaged(f"the file ends before byte {offset + nbytes}")
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _damaged(self, reason: str) -> InputError:
        return InputError(f"{self._path} is damaged: column {self._name.lstrip('/')}: {reason}")


def stored_here(dataset: h5py.Dataset) -> bool:
    """Whether a column of texts is stored as HDF5 stores it by default, which Texts reads."""
    create = dataset.id.get_create_plist()
    plain = create.get_layout() == h5d.CONTIGUOUS and dataset.file.id.get_create_plist().get_sizes() == (8, 8)
    kind = h5py.check_string_dtype(dataset.dtype)
    return bool(plain and kind and kind.length is None and not create.get_external_count())


def _objects(heap: bytes) -> Heap:
    found: Heap = {}
    at = _HEAP.size
    while at + _OBJECT.size <= len(heap):
        number, _, nbytes = _OBJECT.unpack_from(heap, at)
        begin = at + _OBJECT.size
        if number == 0 or begin + nbytes > len(heap):  # what is left is free, or damaged
            break
        found[number] = (begin, nbytes)
        at = begin + -(-nbytes // 8) * 8
    return found
