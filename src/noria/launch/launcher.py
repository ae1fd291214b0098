"""What this rank was given: its location among the machines, its device, its cores and its memory.

Reads the environment and the operating system; knows nothing of models.
"""

import gc
import os
import socket
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from noria.communicator import Communicator
from noria.config import Config
from noria.errors import InputError, require
from noria.launch import cores, memory
from noria.launch.schedulers import SCHEDULERS
from noria.limits import MEMORY_SHARE
from noria.plan.problem import Machine

GPU_VARIABLES = ("CUDA_VISIBLE_DEVICES", *(name for one in SCHEDULERS for name in one.gpus))
NO_GPU = ("", "-1", "NoDevFiles", "none")  # what CUDA_VISIBLE_DEVICES begins with where all GPUs are hidden
MOST_SHARE = 0.97  # of the free memory of a GPU, where the user asks for so much


@dataclass(frozen=True)
class Location:
    """Where a rank runs. `local_rank` counts the ranks of one host; `cores` says in words which are the rank's own."""

    host: str
    local_rank: int
    ranks_on_host: int
    cores: str = ""


def by_node(comm: Communicator) -> Communicator:
    """A communicator whose ranks follow the machines, so that most hops of the ring stay inside a node."""
    hosts = comm.allgather(socket.gethostname())
    return comm.Split(0, key=hosts.index(hosts[comm.Get_rank()]) * len(hosts) + comm.Get_rank())


def location(comm: Communicator) -> Location:
    """Where this rank runs, counted over the communicator. Widens a binding to one core that nobody asked for."""
    rank, host = comm.Get_rank(), socket.gethostname()
    hosts = comm.allgather(host)
    local_rank, ranks_on_host = hosts[:rank].count(host), hosts.count(host)
    cores.widen(local_rank, ranks_on_host)
    return Location(host, local_rank, ranks_on_host)


def with_cores(comm: Communicator, location: Location, device: torch.device) -> Location:
    """The location with its cores: those near the device, one thread of computation each, shared with the ranks beside."""
    cores.stay_near(device)
    own = tuple(sorted(os.sched_getaffinity(0)))
    sharing = comm.allgather((location.host, own)).count((location.host, own))
    num_cores = max(1, len(own) // sharing)
    cores.set_threads(num_cores)
    return replace(location, cores=cores.words(own, num_cores, device))


def device_of(config: Config, location: Location) -> torch.device:
    """This rank's device. Raises InputError for a GPU that is hidden, is not there or does not work."""
    if config.device == "cpu":
        return torch.device("cpu")
    if hidden := hidden_gpus(os.environ):
        require(
            config.device == "auto",
            f"device = {config.device!r} on {location.host}: {hidden}; remove that setting, or run with --device cpu",
        )
        return torch.device("cpu")
    if not torch.cuda.is_available():
        given = [name for name in GPU_VARIABLES if os.environ.get(name)]
        given += ["/dev/nvidia0"] if os.path.exists("/dev/nvidia0") else []
        if config.device == "auto" and not given:
            return torch.device("cpu")
        reason = "this torch is built without CUDA" if torch.version.cuda is None else "CUDA finds no GPU"
        seen = f"; {given[0]} says there is one" if given else ""
        raise InputError(
            f"device = {config.device!r} on {location.host}: {reason}{seen}: correct that, or run with --device cpu"
        )
    return torch.device("cuda", location.local_rank % torch.cuda.device_count())


def hidden_gpus(environment: Mapping[str, str]) -> str:
    """`CUDA_VISIBLE_DEVICES = '-1' hides every GPU`: who wants none to be used, in words; "" where nobody does."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        hides = visible.split(",")[0].strip() in NO_GPU
        return f"CUDA_VISIBLE_DEVICES = {visible!r} hides every GPU" if hides else ""
    given = next((said for one in SCHEDULERS if (said := one.gave_no_gpu(environment))), "")
    return f"{given}: the job was given no GPU" if given else ""


def check_sharing(config: Config, comm: Communicator, location: Location, device: torch.device) -> None:
    """Refuses two ranks on one GPU unless they are allowed. Raises InputError on every rank."""
    uuid = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None
    gpus = Counter((host, gpu) for host, gpu in comm.allgather((location.host, uuid)) if gpu)
    shared = [f"{count} ranks on GPU {gpu} of {host}" for (host, gpu), count in gpus.items() if count > 1]
    if shared and not config.job.allow_gpu_sharing:
        raise InputError(f"{shared[0]}: start one rank per GPU, or set job.allow_gpu_sharing = true")


def device_memory(comm: Communicator, location: Location, device: torch.device) -> int:
    """Bytes of the device that this rank may fill; on a CPU its share of what its cgroup and its machine have free."""
    gc.collect()  # an earlier run of this process
    if device.type == "cuda":
        torch.cuda.empty_cache()  # of which torch keeps the memory
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        sharing = comm.allgather((location.host, uuid)).count((location.host, uuid))  # all ranks have emptied theirs
        return int(torch.cuda.mem_get_info(device)[0] * MEMORY_SHARE / sharing)
    comm.allgather(None)  # one collective on every rank, whatever its device
    return host_memory(location)


def host_memory(location: Location) -> int:
    """Bytes of host memory that this rank may fill: its share of what its machine and its cgroup have free."""
    return int(memory.free_nbytes() * MEMORY_SHARE / location.ranks_on_host)


def machine(config: Config, comm: Communicator, location: Location, device: torch.device) -> Machine:
    """What the rank with the least has, for the planner. Collective. Raises InputError for a scratch folder that is none."""
    folder, placement = scratch_folder(config), config.placement
    needed = placement.stage or bool((placement.cache or {}).get("disk"))
    usable = folder.is_dir() and os.access(folder, os.W_OK)
    own = (
        device_memory(comm, location, device),
        host_memory(location),
        _share_of_disk(folder, location) if usable else 0,
    )
    device_nbytes, cpu_nbytes, scratch = map(min, zip(*comm.allgather(own), strict=True))
    if needed and not usable:
        why = "cannot be written to" if folder.is_dir() else "is not a folder"
        raise InputError(
            f"placement.scratch: {folder} {why} on {location.host}: name a folder on a disk of the node itself"
        )
    most = int(device_nbytes / MEMORY_SHARE * MOST_SHARE) if device.type == "cuda" else None
    return Machine(device.type, device_nbytes, cpu_nbytes, scratch if needed else None, most, str(folder))


def scratch_folder(config: Config) -> Path:
    """Where this rank puts what lives on disk for the run alone."""
    return Path(named_scratch(config) or Path(config.output).absolute().parent)


def named_scratch(config: Config) -> str | None:
    """The scratch folder that the user, the scheduler or TMPDIR names."""
    variables = [*(name for one in SCHEDULERS for name in one.scratch), "TMPDIR"]
    return config.placement.scratch or next(filter(None, map(os.environ.get, variables)), None)


def _share_of_disk(folder: Path, location: Location) -> int:
    space = os.statvfs(folder)
    return int(space.f_bavail * space.f_frsize * MEMORY_SHARE / location.ranks_on_host)


def peak_memory(device: torch.device) -> dict[str, int]:
    """The most bytes that this process has had in host memory and, by torch's count, on its device."""
    on_device = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return {"peak_host_nbytes": memory.peak_nbytes(), "peak_device_nbytes": on_device}
