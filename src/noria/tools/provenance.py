"""What an output says about how it was made. Never the environment: it holds secrets.

Knows versions of the packages; everything else is handed in.
"""

import functools
import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

import h5py

import noria

_PACKAGES = ("h5py", "jinja2", "mpi4py", "numpy", "safetensors", "tokenizers", "torch", "xxhash")


def now() -> str:
    """The time in UTC, as `2026-11-23T03:15:02Z`."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def versions(mpi_library: str = "") -> dict[str, str]:
    """Versions of Noria and of what it computes with. A package that is not installed is left out."""
    found = {"noria": noria.__version__, "python": platform.python_version(), "hdf5": h5py.version.hdf5_version}
    found |= {name: version for name in _PACKAGES if (version := _version(name)) is not None}
    return found | ({"mpi": mpi_library} if mpi_library else {})


@functools.cache  # nothing is installed under a running program, and a search takes milliseconds
def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def segment_of(
    job_ids: Mapping[str, str], hosts: Sequence[str], devices: Sequence[str], argv: Sequence[str], start: str
) -> dict[str, object]:
    """What one job says of itself: job ids, rank 0's host, all hosts, ranks, devices (one a rank), argv, start (UTC)."""
    return {
        "job_ids": dict(job_ids),
        "host": hosts[0],
        "hosts": list(dict.fromkeys(hosts)),
        "ranks": len(devices),
        "devices": list(devices),
        "argv": list(argv),
        "start": start,
    }


def provenance(
    *,
    run_file: str,
    checkpoint_hash: str,
    prompts_hash: str,
    launcher: str,
    devices: Sequence[str],
    start: str,
    mpi_library: str = "",
    **more: object,
) -> dict[str, object]:
    """Attributes for `merge`: the full text of the run file, versions, hashes, launcher, ranks, devices (one a rank),
    start and end (now) in UTC, and whatever else is named; job ids are none unless they are."""
    return {
        "run_file": run_file,
        "versions": versions(mpi_library),
        "checkpoint_hash": checkpoint_hash,
        "prompts_hash": prompts_hash,
        "launcher": launcher,
        "ranks": len(devices),
        "devices": list(devices),
        "job_ids": {},
        "start": start,
        "end": now(),
        **more,
    }
