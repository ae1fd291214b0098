"""How the columns of a file of generations are read: numbers by HDF5, which reads plain ones without a loop; texts without
it; what is stored in another way only after a child has read it.

Knows datasets and whether their file can hold them; nothing of what is in them.
"""

import math
from pathlib import Path
from typing import Protocol

import h5py
import numpy as np
from h5py import h5d

from noria.tools.looking import Looker
from noria.tools.texts import REFERENCE_NBYTES, Texts, stored_here

MAX_CHUNK_NBYTES = 2**26  # HDF5 unpacks a chunk whole, whatever is read of it
_LOOKED_ROWS = 4096  # at once


class Column(Protocol):
    """Values in order, by slices."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> np.ndarray: ...


class _Looked:
    """A column that is not stored as Noria stores it: what is read of it is looked at first."""

    def __init__(self, path: Path, name: str, dataset: h5py.Dataset, looker: Looker):
        self._path, self._name, self._dataset, self._looker = path, name, dataset, looker

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, rows: slice, /) -> np.ndarray:
        start, stop, _ = rows.indices(len(self))
        for begin in range(start, stop, _LOOKED_ROWS):
            self._looker.read(self._path, self._name, begin, min(begin + _LOOKED_ROWS, stop))
        return self._dataset[start:stop]


def column(path: Path, name: str, dataset: h5py.Dataset, looker: Looker) -> Column:
    """How the values of this dataset are read; they are `is_held`."""
    text = dataset.dtype.kind == "O"
    if text and stored_here(dataset):
        return Texts(dataset, dataset.file.id.get_vfd_handle(), path)
    plain = not text and dataset.id.get_create_plist().get_layout() == h5d.CONTIGUOUS
    return dataset if plain else _Looked(path, name, dataset, looker)


def is_held(dataset: h5py.Dataset, file_nbytes: int) -> bool:
    """Whether a file of so many bytes can hold all the values that a dataset says it has, and memory a chunk of it."""
    layout, num = dataset.id.get_create_plist().get_layout(), dataset.size
    if layout == h5d.CHUNKED:
        parts = zip(dataset.shape, dataset.chunks, strict=True)
        held = math.prod(-(-length // part) for length, part in parts) <= dataset.id.get_num_chunks()
        return held and math.prod(dataset.chunks) * dataset.id.get_type().get_size() <= MAX_CHUNK_NBYTES
    if layout == h5d.COMPACT or not num:
        return num <= MAX_CHUNK_NBYTES
    stored, begin = dataset.id.get_storage_size(), dataset.id.get_offset()
    size = REFERENCE_NBYTES if dataset.dtype.kind == "O" else dataset.dtype.itemsize
    return begin is not None and stored >= num * size and begin + stored <= file_nbytes
