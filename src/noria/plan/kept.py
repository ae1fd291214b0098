"""Rates that jobs have measured and left for later ones: a file for each kind of node, in one folder.

Measures nothing. What cannot be read there is not there, and what cannot be written is left out.
"""

import contextlib
import hashlib
import os
import re
from collections.abc import Container
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from noria.errors import InputError
from noria.plan import rates
from noria.plan.rates import CONFIRMED, DOUBTED, NAMES, Node, Rates
from noria.tools.atomic import fsync, new_file

PREFIX = "noria-rates-"
MONTH = timedelta(days=30)  # after which a machine is measured again
SAME = 0.15  # of a figure, when it is measured again


@dataclass(frozen=True)
class Kept:
    """Rates and their file."""

    path: Path
    rates: Rates


def folder_of(output: str | Path) -> Path:
    """Where rates are kept: $NORIA_CACHE, else $XDG_CACHE_HOME/noria, else the folder of the output."""
    if named := os.environ.get("NORIA_CACHE"):
        return Path(named)
    if named := os.environ.get("XDG_CACHE_HOME"):
        return Path(named) / "noria"
    return Path(output).absolute().parent


def all_kept(folder: Path) -> list[Kept]:
    """Those of a folder: first those that somebody put there, which do not say when, then the latest.

    A file that is damaged is left out.
    """
    found = []
    with contextlib.suppress(OSError):
        for path in sorted(folder.iterdir()):
            if path.name.startswith(PREFIX) and path.suffix == ".toml" and path.is_file():
                with contextlib.suppress(InputError):
                    found.append(Kept(path, rates.read(path)))
    return sorted(found, key=lambda one: one.rates.measured or "~", reverse=True)


def find(folder: Path, device: str, node: Node) -> Kept | None:
    """Those of this kind of node."""
    matching = (one for one in all_kept(folder) if is_of(one.rates, device, node))
    return next(matching, None)


def is_of(known: Rates, device: str, node: Node) -> bool:
    return known.device == device and known.node.includes(node)


def is_good(known: Rates, now: datetime) -> bool:
    """Whether they need not be measured again: younger than a month, and no run has come out quite otherwise.

    A file that does not say when it was measured is somebody's own, and stays good.
    """
    if known.standing == DOUBTED:
        return False
    if not known.measured:
        return True
    with contextlib.suppress(ValueError):
        return abs(now - datetime.fromisoformat(known.measured).astimezone(UTC)) < MONTH  # a clock may have been wrong
    return False


def keep(folder: Path, known: Rates, now: datetime) -> Kept | None:
    """Puts rates into their file, whole or not at all; None where that cannot be.

    If another job of this kind of node was faster, its rates are returned and stay: jobs that start together plan alike.
    """
    path = folder / _name(known)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        whole = new_file(path)
    except OSError:
        return None
    try:
        whole.write_text(known.to_toml())
        fsync(whole)
        if (other := _publish(whole, path, known, now)) is not None:
            return Kept(path, other)
        return Kept(path, known)
    except OSError:
        return None
    finally:
        with contextlib.suppress(OSError):
            whole.unlink(missing_ok=True)


def _publish(whole: Path, path: Path, known: Rates, now: datetime) -> Rates | None:
    """Gives the file its name, unless good rates that have as much are there: those."""
    try:
        os.link(whole, path)
        return None
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        if not path.exists():
            os.replace(whole, path)
            return None
    with contextlib.suppress(InputError):
        other = rates.read(path)
        if (
            known.standing != DOUBTED
            and is_good(other, now)
            and set(other.assumed) <= set(known.assumed)
            and other.transport == known.transport
        ):
            return other
    os.replace(whole, path)
    return None


def doubt(folder: Path, known: Rates, now: datetime) -> Rates:
    """The rates, marked: the next job measures them again. Not those that were the same then, nor somebody's own."""
    if known.standing == CONFIRMED or not known.measured:
        return known
    doubted = replace(known, standing=DOUBTED)
    found = find(folder, known.device, known.node)
    if found is not None and found.rates.measured == known.measured:
        keep(folder, doubted, now)
    return doubted


def standing_of(old: Rates | None, new: Rates) -> Rates:
    """The new rates, marked if they are what doubted ones were: then it is not they that are wrong."""
    if old is None or old.standing != DOUBTED:
        return new
    again = [name for name in NAMES if name not in old.assumed and name not in new.assumed and "capacity" not in name]
    same = all(abs(getattr(new, name) / getattr(old, name) - 1) <= SAME for name in again)
    return replace(new, standing=CONFIRMED) if same and again else new


def without(known: Rates, names: Container[str]) -> Rates:
    """The rates as if these had not been measured."""
    left = tuple(name for name in rates.assumed("cpu").assumed if name in known.assumed or name in names)
    rows = {dtype: table for dtype, table in known.matmul_rows.items() if f"matmul.{dtype}" not in left}
    return replace(known, matmul_rows=rows, assumed=left)


def for_plan(folder: Path, device: str, num_ranks: int) -> Kept | None:
    """The rates to plan with where no rank is asked: of a CPU if `device` is "cpu", else of a GPU.

    Those of as many ranks come first, then the latest.
    """
    found = [one for one in all_kept(folder) if (one.rates.device == "CPU") == (device == "cpu")]
    of_as_many = (one for one in found if one.rates.node.ranks * max(one.rates.node.hosts, 1) == num_ranks)
    return next(of_as_many, found[0] if found else None)


def _name(known: Rates) -> str:
    node = known.node
    kind = (known.device, node.ranks, min(node.hosts, 2), node.cores, node.driver, node.cpu)
    words = re.sub(r"[^a-z0-9]+", "-", known.device.lower()).strip("-")[:40]
    return f"{PREFIX}{words}-x{node.ranks}-{hashlib.sha256(repr(kind).encode()).hexdigest()[:8]}.toml"
