"""How files look: what changes when somebody writes to one, or puts another in its place.

Bytes are not compared here: a file that was only touched looks otherwise too.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from noria.errors import InputError

Look = tuple[int, ...]  # device, inode, bytes, time of the last change (ns)


def look_of(status: os.stat_result) -> Look:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def looks_of(paths: Iterable[Path]) -> dict[Path, Look]:
    """How these files look now; those that are not there are left out."""
    found = {}
    for path in paths:
        try:
            found[path] = look_of(path.stat())
        except OSError:
            continue
    return found


def refuse_changed(before: Mapping[Path, Look], doing: str) -> None:
    """Raises InputError for the first file that looks otherwise now; `doing`: what went on meanwhile."""
    now = looks_of(before)
    for path, look in before.items():
        if now.get(path) != look:
            raise InputError(f"{path} changed while it was {doing}: nothing is written; try again when it is whole")
