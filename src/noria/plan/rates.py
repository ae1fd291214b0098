"""What a machine does in a second: measured (machine.toml of noria probe), or built-in figures that are marked as assumed."""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from noria.errors import InputError, require
from noria.limits import DTYPES
from noria.tools.keys import nearest
from noria.tools.toml import read_toml

MAX_MACHINE_FILE = 2**16  # bytes


@dataclass(frozen=True)
class Rates:
    """Of one rank while all ranks are busy: bytes/s unless the name says seconds; matmul: dtype -> flop/s.

    `device_memory` and `host_memory` count bytes read and bytes written. `layer_seconds`: the least that one layer takes
    for one microbatch, however small. `device_capacity`, `host_capacity`: bytes that a rank may fill. `assumed`: the names
    of those that nobody measured.
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
        default_factory=lambda: {"float64": 60e12, "float32": 45e12, "bfloat16": 788e12, "float16": 788e12}
    )
    assumed: tuple[str, ...] = ()

    def to_toml(self) -> str:
        """The machine.toml that `read` makes these rates of."""
        values = {name: value for name, value in asdict(self).items() if name not in ("device", "matmul", "assumed")}
        lines = [
            "# bytes/s of one rank while all are busy; matmul in flop/s, capacities in bytes: noria plan --machine reads them"
        ]
        lines += [f"device = {_quoted(self.device)}"]
        lines += [f"{name} = {value:.4g}" for name, value in values.items() if name not in self.assumed]
        lines += ["", "[matmul]", *(f"{dtype} = {value:.4g}" for dtype, value in self.matmul.items())]
        return "\n".join(lines) + "\n"


NAMES = tuple(f.name for f in fields(Rates) if f.name not in ("device", "matmul", "assumed"))
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


def assumed(device: str) -> Rates:
    """Built-in figures of a kind of device: those of an H200 for "cuda"."""
    return Rates(**(CPU if device == "cpu" else {}), assumed=(*NAMES, "matmul"))


def read(path: str | Path, device: str = "cuda") -> Rates:
    """The rates of a machine.toml; what it leaves out is assumed. Raises InputError for what is wrong with it."""
    if Path(path).is_dir():
        raise InputError(f"machine {path} is a folder: name the file that noria probe --output FILE made")
    remedy = f": noria probe --output {path} makes one"
    tree = read_toml(path, "machine", MAX_MACHINE_FILE, remedy)
    known = (*NAMES, "device", "matmul")
    for name in tree:
        require(name in known, f"machine {path}: unknown key {name[:100]!r}{nearest(name, known)}")
    name = tree.get("device", "")
    require(isinstance(name, str), f"machine {path}: device is {name!r}: it must be a name")
    matmul = tree.get("matmul", {})
    require(isinstance(matmul, dict), f"machine {path}: matmul is {matmul!r}: write [matmul] and a line for each dtype")
    for dtype in matmul:
        require(dtype in DTYPES, f"machine {path}: unknown dtype {dtype[:100]!r} in [matmul]{nearest(dtype, DTYPES)}")
    found = {name: _rate(path, name, tree[name]) for name in NAMES if name in tree}
    base = assumed("cpu" if name == "CPU" else "cuda" if name else device)
    flops = {dtype: _rate(path, f"matmul.{dtype}", value) for dtype, value in matmul.items()}
    left = tuple(other for other in NAMES if other not in found) + (() if flops else ("matmul",))
    values: dict[str, Any] = {other: getattr(base, other) for other in NAMES} | found
    return Rates(device=name or base.device, matmul=base.matmul | flops, assumed=left, **values)


def _rate(path: str | Path, name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e21:
        raise InputError(f"machine {path}: {name} is {value!r}: it must be a number above 0")
    return float(value)


def _quoted(text: str) -> str:
    kept = "".join(letter if letter.isprintable() and letter not in '"\\' else "?" for letter in text)
    return f'"{kept}"'
