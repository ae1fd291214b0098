"""The kind of node that the ranks of a job are on: what its rates depend on. Measures nothing."""

import os
import re
from pathlib import Path

import torch

from noria.communicator import Communicator
from noria.launch.launcher import Location
from noria.plan.rates import Node


def node_of(comm: Communicator, location: Location, device: torch.device) -> tuple[str, Node]:
    """The device's name and the kind of node, the same on every rank; where ranks differ, each of theirs. Collective."""
    own = device_name(device), driver(), cpu_name(), torch.get_num_threads(), location.ranks_on_host, location.host
    names, drivers, cpus, cores, ranks, hosts = zip(*comm.allgather(own), strict=True)
    device_words, driver_words, cpu_words = (" + ".join(dict.fromkeys(words)) for words in (names, drivers, cpus))
    return device_words, Node(max(ranks), len(set(hosts)), min(cores), driver_words, cpu_words)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def driver() -> str:
    """The version of NVIDIA's kernel module, such as `580.95.05`; "" without one."""
    try:
        said = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return ""
    found = re.search(r"\b\d+\.\d+(\.\d+)?\b", said)
    return found[0] if found else ""


def cpu_name() -> str:
    """The processor's name, as Linux says it; else its kind, such as `aarch64`."""
    try:
        said = Path("/proc/cpuinfo").read_text()
    except OSError:
        said = ""
    found = re.search(r"^model name\s*:\s*(.+)$", said, re.MULTILINE)
    return found[1].strip() if found else os.uname().machine


def mount_of(folder: Path) -> str:
    """The mount point of a folder: which disk it is on."""
    place = folder.resolve()
    while not os.path.ismount(place):
        place = place.parent
    return str(place)
