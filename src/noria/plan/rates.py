"""What a machine does in a second: measured, or built-in figures that are marked as assumed; and machine.toml, which has them.

Measures nothing.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from noria.errors import InputError, require
from noria.limits import DTYPES
from noria.plan.cards import card_of
from noria.tools.keys import nearest
from noria.tools.toml import parse_toml, read_toml

MAX_MACHINE_FILE = 2**16  # bytes
LASTING_ROWS = 4096  # of a product that takes so long that a GPU's clock is as in a run
CHECKED, DOUBTED, CONFIRMED = "checked", "doubted", "confirmed"  # standings: see Rates


@dataclass(frozen=True)
class Node:
    """The kind of node that was measured, beside its device: ranks of each host, hosts, cores of a rank, driver, CPU.

    0 or "": not known, so any.
    """

    ranks: int = 0
    hosts: int = 0
    cores: int = 0
    driver: str = ""
    cpu: str = ""

    def includes(self, other: "Node") -> bool:
        """Whether the other node is of this kind. Of hosts it counts only whether there are several."""
        ours, theirs = ({**asdict(node), "hosts": min(node.hosts, 2)} for node in (self, other))
        return all(value == theirs[name] for name, value in ours.items() if value)


@dataclass(frozen=True)
class Rates:
    """Of one rank while all ranks are busy: bytes/s unless the name says seconds; matmul: dtype -> flop/s.

    `device_memory` and `host_memory` count bytes read and bytes written. `layer_seconds`: the least that one layer takes
    for one microbatch, however small. `device_capacity`, `host_capacity`: bytes that a rank may fill. `matmul_rows`: dtype
    -> rows -> flop/s, of a product of so many rows with a large square matrix. `assumed`: the names of those
    that nobody measured (`matmul.DTYPE` for a dtype).

    `transport`, `scratch`: between which ranks' memory hops were measured, and on which disk (its mount point).
    `measured`: when (UTC). `standing`: DOUBTED once a run deviated from its plan by too much, CONFIRMED if the rates were
    the same when they were measured again.
    """

    device: str = "NVIDIA H200"
    host_to_device: float = 55.5e9
    device_to_host: float = 55.4e9
    both_directions: float = 50.8e9  # each
    device_memory: float = 4.3e12
    host_memory: float = 200e9
    disk_read: float = 1.8e9
    disk_write: float = 2.1e9
    hop: float = 280e9
    hop_seconds: float = 15e-6
    layer_seconds: float = 150e-6
    device_capacity: float = 134e9
    host_capacity: float = 115e9
    matmul: dict[str, float] = field(
        default_factory=lambda: {"float64": 60e12, "float32": 45e12, "bfloat16": 690e12, "float16": 670e12}
    )
    matmul_rows: dict[str, dict[int, float]] = field(default_factory=dict)
    assumed: tuple[str, ...] = ()
    node: Node = Node()
    transport: str = ""
    scratch: str = ""
    measured: str = ""
    standing: str = CHECKED

    def matmul_at(self, dtype: str, rows: float) -> float:
        """flop/s of a product of so many rows: as measured, and between two measured numbers on a line of logarithms.

        With fewer rows than the fewest that were measured the time stays; a machine without rows has one figure. On a GPU more
        rows are never slower: what was measured otherwise is noise. A CPU's library has a way of its own for few rows, beside
        which a few more are slower. Where many were measured fewer are never faster than these: in short measurements a
        machine's clock is higher.
        """
        measured = sorted(self.matmul_rows.get(dtype, {}).items())
        if not measured:
            return self.matmul[dtype]
        speeds = [speed for _, speed in measured]
        fastest = speeds if self.device == "CPU" else itertools.accumulate(speeds, max)
        most, lasting = measured[-1]
        limit = lasting if most >= LASTING_ROWS else math.inf
        known = [(count, min(speed, limit)) for (count, _), speed in zip(measured, fastest, strict=True)]
        if rows <= known[0][0]:
            return known[0][1] * rows / known[0][0]
        for (fewer, slow), (more, fast) in itertools.pairwise(known):
            if rows <= more:
                place = math.log(rows / fewer) / math.log(more / fewer)
                return slow * (fast / slow) ** place
        return known[-1][1]

    def to_toml(self) -> str:
        """The machine.toml that `read` makes these rates of."""
        lines = [
            "# bytes/s of one rank while all are busy; matmul in flop/s, capacities in bytes: noria plan --machine reads them"
        ]
        words = {"device": self.device, **asdict(self.node), **{name: getattr(self, name) for name in TEXTS}}
        lines += [f"{name} = {_quoted(value)}" for name, value in words.items() if value and value != CHECKED]
        lines += [f"{name} = {getattr(self, name):.4g}" for name in NAMES if name not in self.assumed]
        flops = {dtype: value for dtype, value in self.matmul.items() if f"matmul.{dtype}" not in self.assumed}
        lines += ["", "[matmul]", *(f"{dtype} = {value:.4g}" for dtype, value in flops.items())]
        for dtype, rows in self.matmul_rows.items():
            lines += [
                "",
                f"[matmul_rows.{dtype}]",
                *(f"{count} = {value:.4g}" for count, value in sorted(rows.items())),
            ]
        return "\n".join(lines) + "\n"

    def needed(self, dtype: str, disk: bool) -> "Rates":
        """The same for a run that computes in `dtype` and reads a disk, or not: nothing else counts as assumed."""
        others = {f"matmul.{other}" for other in DTYPES if other != dtype}
        left_out = others | (set() if disk else {"disk_read", "disk_write"})
        return replace(self, assumed=tuple(name for name in self.assumed if name not in left_out))


TEXTS = ("transport", "scratch", "measured", "standing")
_OTHERS = ("device", "matmul", "matmul_rows", "assumed", "node", *TEXTS)
NAMES = tuple(f.name for f in fields(Rates) if f.name not in _OTHERS)
_NODE: dict[str, type] = {f.name: type(getattr(Node, f.name)) for f in fields(Node)}


def joined(old: Rates, new: Rates) -> Rates:
    """The new rates, and the old ones where the new ones are assumed. They are as old as the oldest of them."""
    kept = {name: getattr(old, name) for name in NAMES if name in new.assumed}
    flops = {dtype: flops for dtype, flops in new.matmul.items() if f"matmul.{dtype}" not in new.assumed}
    texts = {name: getattr(new, name) or getattr(old, name) for name in ("transport", "scratch")}
    left = tuple(name for name in new.assumed if name in old.assumed)
    if len(left) < len(new.assumed):
        texts["measured"] = min(filter(None, (old.measured, new.measured)), default="")
        texts["standing"] = CONFIRMED if old.standing == CONFIRMED else new.standing
    rows = old.matmul_rows | new.matmul_rows
    return replace(new, matmul=old.matmul | flops, matmul_rows=rows, assumed=left, **kept, **texts)


CPU: dict[str, Any] = {
    "device": "CPU",
    "host_to_device": 8e9,
    "device_to_host": 8e9,
    "both_directions": 5e9,
    "device_memory": 15e9,
    "host_memory": 15e9,
    "disk_read": 1e9,
    "disk_write": 1e9,
    "hop": 2e9,
    "hop_seconds": 50e-6,
    "layer_seconds": 200e-6,
    "device_capacity": 16e9,
    "host_capacity": 16e9,
    "matmul": {"float64": 50e9, "float32": 100e9, "bfloat16": 50e9, "float16": 10e9},
}
# What no machine does, so a mistake of units: (least, most, unit) by the end of the name.
_BOUNDS = {
    "seconds": (1e-9, 10, "seconds"),
    "capacity": (1e6, 1e15, "bytes"),
    "matmul": (1e6, 1e18, "flop/s"),
    "": (1e6, 1e15, "bytes/s"),
}


def assumed(device: str) -> Rates:
    """Starting values of a device: "cpu", the name of a GPU, or "cuda" for any. Of a GPU that no card's data sheet here
    names they are those of an H200."""
    card = card_of(device)
    values = CPU if device.lower() == "cpu" else card.rates() if card and card.device != Rates.device else {}
    return Rates(**values, assumed=(*NAMES, *(f"matmul.{dtype}" for dtype in DTYPES)))


def is_all_assumed(known: Rates) -> bool:
    return set(known.assumed) == set(assumed(known.device).assumed)


def read(path: str | Path, device: str = "cuda") -> Rates:
    """The rates of a machine.toml; what it leaves out is assumed. Raises InputError for what is wrong with it.

    `path` may also be the name of a card, such as H100, where no file has that name: its starting values.
    """
    if Path(path).is_dir():
        raise InputError(f"machine {path} is a folder: name the file that noria probe --output FILE made")
    card = card_of(str(path))
    if card and "." not in Path(path).name and not Path(path).exists():
        return assumed(card.device)
    return _rates(
        read_toml(path, "machine", MAX_MACHINE_FILE, f": noria probe --output {path} makes one"), path, device
    )


def parse(text: str, name: str = "text", device: str = "cuda") -> Rates:
    """The same from the text of such a file."""
    return _rates(parse_toml(text.encode(), "machine", name, MAX_MACHINE_FILE), name, device)


def _rates(tree: Mapping[str, Any], path: str | Path, device: str) -> Rates:
    known = (*NAMES, "device", "matmul", "matmul_rows", *TEXTS, *_NODE)
    for name in tree:
        require(name in known, f"machine {path}: unknown key {name[:100]!r}{nearest(name, known)}")
    for name in ("device", *TEXTS):
        value = tree.get(name, "")
        require(isinstance(value, str), f"machine {path}: {name} is {value!r}: it must be a text")
    _check_texts(path, tree)
    for name, kind in _NODE.items():
        value = tree.get(name, kind())
        right = type(value) is kind and (isinstance(value, str) or (isinstance(value, int) and 0 <= value < 2**31))
        words = "a name" if kind is str else "a whole number, 1 or more"
        require(right, f"machine {path}: {name} is {value!r}: it must be {words}")
    name = tree.get("device", "")
    found = {name: _rate(path, name, tree[name]) for name in NAMES if name in tree}
    base = assumed(name or device)
    flops = {dtype: _rate(path, f"matmul.{dtype}", value) for dtype, value in _table(path, tree, "matmul").items()}
    rows = {
        dtype: _flops_by_rows(path, f"matmul_rows.{dtype}", table)
        for dtype, table in _table(path, tree, "matmul_rows").items()
    }
    flops = {dtype: max(table.values()) for dtype, table in rows.items() if table} | flops
    left = tuple(one for one in base.assumed if one not in found and one.removeprefix("matmul.") not in flops)
    values: dict[str, Any] = {other: getattr(base, other) for other in NAMES} | found
    texts = {name: tree[name] for name in TEXTS if name in tree}
    node = Node(**{name: tree[name] for name in _NODE if name in tree})
    matmul = base.matmul | flops
    return Rates(
        device=name or base.device, matmul=matmul, matmul_rows=rows, assumed=left, node=node, **texts, **values
    )


def _check_texts(path: str | Path, tree: Mapping[str, Any]) -> None:
    """Refuses a time or a standing that nobody writes. Raises InputError."""
    measured, standing = tree.get("measured", ""), tree.get("standing", CHECKED)
    known = (CHECKED, DOUBTED, CONFIRMED)
    require(standing in known, f"machine {path}: standing is {standing[:100]!r}: it must be one of {', '.join(known)}")
    try:
        datetime.fromisoformat(measured or "2026-01-01")
    except ValueError:
        said = 'a time as "2026-11-29T15:11:36Z", or left out'
        raise InputError(f"machine {path}: measured is {measured[:100]!r}: it must be {said}") from None


def _table(path: str | Path, tree: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A table with a value for some dtypes."""
    table = tree.get(name, {})
    line = f"[{name}] and a line for each dtype" if name == "matmul" else f"[{name}.DTYPE] and a line for each count"
    require(isinstance(table, dict), f"machine {path}: {name} is {table!r}: write {line}")
    for dtype in table:
        require(dtype in DTYPES, f"machine {path}: unknown dtype {dtype[:100]!r} in [{name}]{nearest(dtype, DTYPES)}")
    return table


def _flops_by_rows(path: str | Path, name: str, table: object) -> dict[int, float]:
    require(isinstance(table, dict), f"machine {path}: {name} is {table!r}: write [{name}] and a line for each count")
    assert isinstance(table, dict)
    for rows in table:
        right = rows.isascii() and rows.isdigit() and 0 < len(rows) < 10 and int(rows) > 0
        require(right, f"machine {path}: {rows[:20]!r} in [{name}] is not a number of rows")
    return {int(rows): _rate(path, f"matmul {name}.{rows}", value) for rows, value in table.items()}


def _rate(path: str | Path, name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise InputError(f"machine {path}: {name} is {value!r}: it must be a number above 0")
    end = "matmul" if name.startswith("matmul") else name.rpartition("_")[2]
    least, most, unit = _BOUNDS.get(end, _BOUNDS[""])
    require(
        least <= value <= most,
        f"machine {path}: {name} is {value:g} {unit}: it must be between {least:g} and {most:g}, as a machine's is",
    )
    return float(value)


def _quoted(value: object) -> str:
    if isinstance(value, int):
        return str(value)
    kept = "".join(letter if letter.isprintable() and letter not in '"\\' else "?" for letter in str(value))
    return f'"{kept}"'
