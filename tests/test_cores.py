from types import SimpleNamespace

import pytest
import torch

from noria.launch import cores

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "2"}
ASKED = {"PRTE_MCA_hwloc_default_binding_policy": "core"}


@pytest.fixture
def affinity(monkeypatch):
    """Affinities that are only told: of this process, of its launcher, and what was set."""
    for name in ("OMPI_COMM_WORLD_SIZE", *cores.BINDING_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    told = SimpleNamespace(own=set(), launchers=set(), taken=[])
    monkeypatch.setattr(cores.os, "sched_getaffinity", lambda pid: set(told.launchers if pid else told.own))
    monkeypatch.setattr(cores.os, "sched_setaffinity", lambda pid, new: told.taken.append(sorted(new)))
    return told


@pytest.fixture
def two_nodes(tmp_path, monkeypatch):
    """A machine of 8 cores: 0-3 on NUMA node 0, 4-7 on node 1, where the GPU at 0002:c1:00.0 is."""
    for core in range(8):
        (tmp_path / f"devices/system/cpu/cpu{core}/node{core // 4}").mkdir(parents=True)
    gpu = tmp_path / "bus/pci/devices/0002:c1:00.0"
    gpu.mkdir(parents=True)
    (gpu / "numa_node").write_text("1\n")
    monkeypatch.setattr(cores, "SYSTEM", tmp_path)
    address = SimpleNamespace(pci_domain_id=2, pci_bus_id=0xC1, pci_device_id=0)
    monkeypatch.setattr(cores.torch.cuda, "get_device_properties", lambda device: address)
    return gpu / "numa_node"


@pytest.mark.parametrize(
    ("bound", "given", "environment", "widened"),
    [
        ({5}, range(8), OPEN_MPI, [4, 5, 6, 7]),
        ({5, 6}, range(8), OPEN_MPI, None),
        ({5}, range(8), {}, None),
        ({5}, range(8), OPEN_MPI | ASKED, None),
        ({0}, range(2), OPEN_MPI, None),
    ],
    ids=["one core by default", "two cores", "another launcher", "asked for", "no core to spare"],
)
def test_a_binding_to_one_core_is_widened_only_where_nobody_asked_for_it(
    monkeypatch, affinity, bound, given, environment, widened
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    affinity.own, affinity.launchers = bound, given
    cores.widen(1, 2)
    assert affinity.taken == ([widened] if widened else [])


@pytest.mark.parametrize(
    ("own", "launchers", "environment", "taken"),
    [
        (range(8), range(8), {}, [4, 5, 6, 7]),
        ([2, 3, 4], range(8), {}, [4]),
        ([4, 5], range(8), {}, None),
        ([0, 1], range(8), {}, None),
        ([0, 1], range(8), OPEN_MPI, [4, 5, 6, 7]),
        (range(8), range(8), OPEN_MPI | ASKED, None),
        ([0, 1], range(4), OPEN_MPI, None),
    ],
    ids=["all", "some", "near already", "bound elsewhere", "Open MPI's choice", "asked for", "none to be had"],
)
def test_a_rank_stays_on_the_cores_of_its_gpus_node(
    monkeypatch, affinity, two_nodes, own, launchers, environment, taken
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    affinity.own, affinity.launchers = set(own), set(launchers)
    cores.stay_near(GPU)
    assert affinity.taken == ([taken] if taken else [])


@pytest.mark.parametrize("content", ["-1\n", "", None], ids=["no node", "empty", "no file"])
def test_a_machine_that_does_not_say_where_its_gpu_is_changes_nothing(affinity, two_nodes, content):
    two_nodes.unlink() if content is None else two_nodes.write_text(content)
    affinity.own = set(range(8))
    cores.stay_near(GPU)
    cores.stay_near(CPU)
    assert cores.gpu_node(GPU) is None and affinity.taken == []


def test_the_words_name_the_nodes_a_gpu_elsewhere_and_threads_too_many(two_nodes, monkeypatch):
    monkeypatch.setattr(cores.torch, "get_num_threads", lambda: 1)
    assert cores.words([4, 5, 6, 7], 4, GPU) == "4 cores of NUMA node 1"
    assert cores.words([0], 1, GPU) == "1 core of NUMA node 0 (its GPU is at node 1)"
    assert cores.words(range(8), 4, GPU) == "4 cores of NUMA nodes 0, 1 (its GPU is at node 1)"
    assert cores.words(range(8), 8, CPU) == "8 cores of NUMA nodes 0, 1"
    monkeypatch.setattr(cores, "SYSTEM", cores.SYSTEM / "nowhere")
    assert cores.words(range(8), 8, CPU) == "8 cores"
    monkeypatch.setattr(cores.torch, "get_num_threads", lambda: 9)
    assert cores.words(range(8), 8, CPU) == "8 cores, 9 threads, which is slow: unset OMP_NUM_THREADS"


def test_a_rank_computes_in_as_many_threads_as_it_has_cores_unless_the_user_says_otherwise(monkeypatch):
    chosen = []
    monkeypatch.setattr(cores.torch, "set_num_threads", chosen.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores.set_threads(3)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    cores.set_threads(3)
    assert chosen == [3]
