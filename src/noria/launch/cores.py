"""The cores of a rank: which it may use, the NUMA nodes that they and its GPU lie on, how many threads that makes.

Reads and sets this process's affinity; knows nothing of configurations or messages.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from noria.tools.text import plural

# Where one of these is set, the user has said how ranks are to be bound.
BINDING_VARIABLES = ("PRTE_MCA_hwloc_default_binding_policy", "OMPI_MCA_hwloc_base_binding_policy")
SYSTEM = Path("/sys")  # Linux's description of the machine


def widen(local_rank: int, ranks_on_host: int) -> None:
    """Takes this rank's share of its launcher's cores where Open MPI bound it to a single one, as it does by default.

    A rank computes in one thread and talks to MPI in another: on one core each would wait for the other.
    """
    if len(os.sched_getaffinity(0)) > 1 or not _unasked():
        return
    cores = sorted(_of_launcher())
    share = len(cores) // ranks_on_host
    if share > 1:
        os.sched_setaffinity(0, cores[local_rank * share : (local_rank + 1) * share])


def stay_near(device: torch.device) -> None:
    """Leaves only cores of the GPU's NUMA node, so that memory touched first lies beside the GPU and copies are fast.

    Before the threads start that are to stay there too. A binding that the user asked for stays as it is, and so does
    one without a core of that node, unless it is Open MPI's own choice.
    """
    node = gpu_node(device)
    if node is None or any(name in os.environ for name in BINDING_VARIABLES):
        return
    own = os.sched_getaffinity(0)
    for given in (own, _of_launcher() if _unasked() else set()):
        near = {core for core in given if node_of(core) == node}
        if near:
            if near != own:
                os.sched_setaffinity(0, near)
            return


def gpu_node(device: torch.device) -> int | None:
    """The NUMA node of a GPU, None for a CPU and where the machine does not say."""
    if device.type != "cuda":
        return None
    at: Any = torch.cuda.get_device_properties(device)  # torch's own annotations leave these three out
    try:
        address = f"{at.pci_domain_id:04x}:{at.pci_bus_id:02x}:{at.pci_device_id:02x}.0"
        node = int((SYSTEM / "bus/pci/devices" / address / "numa_node").read_text())
    except (AttributeError, OSError, ValueError):  # torch tells since 2.6; a virtual machine may not
        return None
    return node if node >= 0 else None


def node_of(core: int) -> int | None:
    """The NUMA node of a core, None where the machine does not say."""
    nodes = (SYSTEM / f"devices/system/cpu/cpu{core}").glob("node[0-9]*")
    return next((int(node.name.removeprefix("node")) for node in nodes), None)


def words(cores: Iterable[int], num_cores: int, device: torch.device) -> str:
    """As `8 cores of NUMA node 0`: `num_cores` of those. Says so where the GPU is at another node, or threads too many."""
    nodes = sorted({node for core in cores if (node := node_of(core)) is not None})
    said, gpu = plural(num_cores, "core"), gpu_node(device)
    if nodes:
        said += f" of NUMA node{'' if len(nodes) == 1 else 's'} {', '.join(map(str, nodes))}"
    if gpu is not None and nodes != [gpu]:
        said += f" (its GPU is at node {gpu})"
    threads = torch.get_num_threads()
    return said if threads <= num_cores else f"{said}, {threads} threads, which is slow: unset OMP_NUM_THREADS"


def set_threads(num_cores: int) -> None:
    """As many threads of computation as the rank has cores, unless OMP_NUM_THREADS says otherwise."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(num_cores)


def _unasked() -> bool:
    """Whether Open MPI started this rank and nobody said how it is to be bound."""
    return "OMPI_COMM_WORLD_SIZE" in os.environ and not any(name in os.environ for name in BINDING_VARIABLES)


def _of_launcher() -> set[int]:
    return os.sched_getaffinity(os.getppid())
