"""What each rank measured of the last job of an output, as numbers; a file may hold anything in its place."""

from itertools import islice
from typing import Any

import h5py
import numpy as np

from noria.output.columns import column, is_held
from noria.output.generations import Generations
from noria.tools.damage import damaged_is_input_error
from noria.tools.looking import Looker

MAX_RANKS, MAX_NAMES = 2**16, 100


def timings_of(file: Generations) -> dict[str, np.ndarray]:
    """Name -> [ranks] float64, of every measured number (engine/timing.py) that is finite, all of one length."""
    found: dict[str, np.ndarray] = {}
    with damaged_is_input_error(file.path), Looker() as looker:
        group: Any = file.file["timing"] if isinstance(file.file.get("timing", getlink=True), h5py.HardLink) else None
        for name in islice(group, MAX_NAMES) if isinstance(group, h5py.Group) else ():
            dataset = group[name] if isinstance(group.get(name, getlink=True), h5py.HardLink) else None
            if isinstance(dataset, h5py.Dataset) and _is_numbers(dataset, file.path.stat().st_size):
                values = column(file.path, f"timing/{name}", dataset, looker)[:].astype(np.float64)
                if np.isfinite(values).all() and len(values) == len(next(iter(found.values()), values)):
                    found[name] = values
    return found


def _is_numbers(dataset: h5py.Dataset, file_nbytes: int) -> bool:
    plain = dataset.ndim == 1 and dataset.dtype.kind in "iuf" and 1 <= dataset.size <= MAX_RANKS
    return plain and not dataset.is_virtual and not dataset.external and is_held(dataset, file_nbytes)
