"""Host memory that a process may still fill: what its machine and the control groups above it leave; and what it has had.

Reads /proc and the memory controller, of cgroup versions 1 and 2. Knows nothing of ranks.
"""

import os
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

UNLIMITED = 1 << 62


@dataclass(frozen=True)
class _Names:
    """The files of a group in one version: its limits, what it uses, and which of that the kernel takes back at need."""

    limits: tuple[str, ...]
    usage: str
    reclaimable: tuple[str, ...]  # lines of memory.stat: pages of files, those of the groups below included


_VERSION_1 = _Names(("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
# memory.high is where the kernel begins to hold a group up
_VERSION_2 = _Names(("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file"))


def free_nbytes(root: Path = Path("/")) -> int:
    """Bytes that this process may still fill: the least of what its machine and each group above it leave.

    Pages of files count as free, in a group as in the kernel's own MemAvailable: they are given back when memory is
    needed. `root` is the root of the file system.
    """
    lines = (root / "proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    return min([available, *(_left(folder, names, own) for folder, names, own in _groups(root))])


def peak_nbytes(root: Path = Path("/")) -> int:
    """The most bytes that this process has had at once; `root` as above.

    Where its status does not say (gVisor's has no VmHWM), by its resource usage, which may begin at what its parent had.
    """
    lines = (root / "proc/self/status").read_text().splitlines()
    told = next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)
    return 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if told is None else told)


def _groups(root: Path) -> Iterator[tuple[Path, _Names, bool]]:
    """The folders of this process's group and of all above it, in each hierarchy that may limit memory; and which it is."""
    paths = _paths(root)
    for mount, top, version in _mounts(root):
        path = paths.get(version)
        if path is None:
            continue
        # A container sees its own group as the top of the mount, and in older ones its path from the host's.
        below = path.removeprefix(top.rstrip("/")).strip("/")
        folder, parts = root / mount.lstrip("/"), below.split("/") if below else []
        yield folder, version, not parts
        for number, part in enumerate(parts, 1):
            folder = folder / part
            yield folder, version, number == len(parts)


def _paths(root: Path) -> dict[_Names, str]:
    """The path of this process's group in the hierarchies of memory, by version."""
    found = {}
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers:
            found[_VERSION_2] = path
        elif "memory" in controllers.split(","):
            found[_VERSION_1] = path
    return found


def _mounts(root: Path) -> Iterator[tuple[str, str, _Names]]:
    """Where hierarchies of memory are mounted, and which of their groups is the top there."""
    for line in _lines(root / "proc/self/mountinfo"):
        fields, _, more = line.partition(" - ")
        top, mount = fields.split()[3:5]
        kind, _, options = more.split()[:3]
        if kind == "cgroup2":
            yield mount, top, _VERSION_2
        elif kind == "cgroup" and "memory" in options.split(","):
            yield mount, top, _VERSION_1


def _left(folder: Path, names: _Names, own: bool) -> int:
    """Bytes that one group leaves; without limit if it has none, or it holds for no groups below it and is not our own."""
    limits = [number for name in names.limits if (number := _number(folder / name)) is not None]
    usage = _number(folder / names.usage)
    if not limits or usage is None or (not own and _number(folder / "memory.use_hierarchy") == 0):
        return UNLIMITED
    stat = dict(line.split(maxsplit=1) for line in _lines(folder / "memory.stat") if " " in line)
    reclaimable = sum(int(stat.get(name, 0)) for name in names.reclaimable)
    return max(0, min(limits) - max(0, usage - reclaimable))


def _number(path: Path) -> int | None:
    """The number in a file; None if there is no such file, or no limit (`max`)."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in os.fsdecode(path.read_bytes()).split("\n") if line]  # with paths, which may be no text
    except OSError:
        return []
