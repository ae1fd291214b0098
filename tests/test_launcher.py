import weakref
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from noria import config
from noria.errors import InputError
from noria.launch import launcher, mpi
from noria.launch.mpi import Solo

RUN = {"model": "m", "prompts": "p", "output": "o"}


class Team(Solo):
    """A communicator of which this process is one rank: allgather repeats what it says, with the others' hosts."""

    def __init__(self, rank, hosts):
        self.rank, self.hosts = rank, hosts

    def Get_rank(self):
        return self.rank

    def Get_size(self):
        return len(self.hosts)

    def allgather(self, value):
        return self.hosts if isinstance(value, str) else [(host, value[1]) for host in self.hosts]


def test_a_rank_counts_the_ranks_of_its_own_host(monkeypatch):
    monkeypatch.setattr(launcher.socket, "gethostname", lambda: "b")
    place = launcher.location(Team(3, ["a", "b", "a", "b"]))
    assert (place.host, place.local_rank, place.ranks_on_host) == ("b", 1, 2)


def test_ranks_with_the_same_cores_share_them(monkeypatch):
    team = Team(3, ["a", "b", "a", "b"])
    monkeypatch.setattr(launcher.os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    monkeypatch.setattr(launcher.cores, "SYSTEM", Path("/nowhere"))
    chosen = []
    monkeypatch.setattr(launcher.torch, "set_num_threads", chosen.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    place = launcher.with_cores(team, launcher.Location("b", 1, 2), launcher.torch.device("cpu"))
    assert (place.cores, chosen) == ("2 cores", [2])


def test_auto_takes_the_cpu_only_where_no_gpu_was_given(monkeypatch):
    place = launcher.Location("here", 0, 1)
    monkeypatch.setattr(launcher.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(launcher.os.path, "exists", lambda path: False)
    for name in launcher.GPU_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert launcher.device_of(config.load(None, RUN), place).type == "cpu"
    monkeypatch.setenv("SLURM_JOB_GPUS", "0,1")
    with pytest.raises(InputError, match="SLURM_JOB_GPUS says there is one: correct that, or run with --device cpu"):
        launcher.device_of(config.load(None, RUN), place)
    assert launcher.device_of(config.load(None, RUN | {"device": "cpu"}), place).type == "cpu"


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"CUDA_VISIBLE_DEVICES": "-1"}, "CUDA_VISIBLE_DEVICES = '-1' hides every GPU"),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, "CUDA_VISIBLE_DEVICES = 'NoDevFiles' hides every GPU"),
        ({"CUDA_VISIBLE_DEVICES": ""}, "CUDA_VISIBLE_DEVICES = '' hides every GPU"),
        ({"CUDA_VISIBLE_DEVICES": "-1,0"}, "CUDA_VISIBLE_DEVICES = '-1,0' hides every GPU"),
        ({"SLURM_GPUS_ON_NODE": "0"}, "SLURM_GPUS_ON_NODE = 0: the job was given no GPU"),
        ({"SLURM_GPUS_ON_NODE": "0", "SLURM_JOB_GPUS": ""}, "SLURM_GPUS_ON_NODE = 0: the job was given no GPU"),
        ({"SLURM_GPUS_ON_NODE": "0", "SLURM_JOB_GPUS": "3"}, ""),
        ({"SLURM_GPUS_ON_NODE": "0", "CUDA_VISIBLE_DEVICES": "1"}, ""),
        ({"SLURM_GPUS_ON_NODE": "4"}, ""),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, ""),
        ({"CUDA_VISIBLE_DEVICES": "GPU-8932f937"}, ""),
        ({}, ""),
    ],
)
@pytest.mark.parametrize("there", [True, False])
def test_gpus_that_are_hidden_on_purpose_are_no_error_and_no_device(monkeypatch, variables, said, there):
    for name in launcher.GPU_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launcher.torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(launcher.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(launcher.os.path, "exists", lambda path: said != "")  # the device files are there
    place = launcher.Location("here", 0, 1)
    assert launcher.hidden_gpus(launcher.os.environ) == said
    if said:
        assert launcher.device_of(config.load(None, RUN), place).type == "cpu"
        with pytest.raises(
            InputError, match=f"^device = 'cuda' on here: {said}; remove that setting, or run with --device cpu"
        ):
            launcher.device_of(config.load(None, RUN | {"device": "cuda"}), place)
    elif there:
        assert launcher.device_of(config.load(None, RUN), place).type == "cuda"
    elif variables:
        with pytest.raises(InputError, match="says there is one"):
            launcher.device_of(config.load(None, RUN), place)


@pytest.mark.parametrize(("visible", "devices"), [(4, [0, 1, 2, 3]), (2, [0, 1, 0, 1]), (1, [0, 0, 0, 0])])
def test_a_rank_takes_the_gpu_of_its_place_on_the_node_of_those_that_it_sees(monkeypatch, visible, devices):
    for name in launcher.GPU_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(launcher.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(launcher.torch.cuda, "device_count", lambda: visible)
    places = [launcher.Location("here", local_rank, 4) for local_rank in range(4)]
    assert [launcher.device_of(config.load(None, RUN), place).index for place in places] == devices


@pytest.mark.parametrize(
    ("gpus", "said"),
    [
        ([("a", "x"), ("a", "y"), ("b", "x")], None),
        (
            [("a", "x"), ("b", "x"), ("a", "x")],
            "2 ranks on GPU x of a: start one rank per GPU, or set job.allow_gpu_sharing",
        ),
    ],
)
def test_two_ranks_on_one_gpu_are_refused_unless_they_are_allowed(monkeypatch, gpus, said):
    monkeypatch.setattr(launcher.torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="x"))

    class Ranks(Solo):
        def allgather(self, value):
            assert value == gpus[0]
            return gpus

    arguments = Ranks(), launcher.Location("a", 0, 2), launcher.torch.device("cuda", 0)
    with pytest.raises(InputError, match=said) if said else nullcontext():
        launcher.check_sharing(config.load(None, RUN), *arguments)
    launcher.check_sharing(config.load(None, RUN | {"allow_gpu_sharing": True}), *arguments)


def test_the_memory_of_a_rank_is_its_share_of_what_is_free(monkeypatch):
    monkeypatch.setattr(launcher.memory, "free_nbytes", lambda: 400)
    place = launcher.Location("here", 0, 2)
    assert launcher.device_memory(Solo(), place, launcher.torch.device("cpu")) == int(400 * 0.9 / 2)


def test_what_an_earlier_run_of_the_process_has_left_is_free(monkeypatch):
    class Held:
        """As a model whose parts know each other."""

        def __init__(self):
            self.own = self

    held, device = {"allocated": weakref.ref(Held()), "kept": True}, launcher.torch.device("cuda", 0)
    monkeypatch.setattr(launcher.torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="x"))
    monkeypatch.setattr(launcher.torch.cuda, "empty_cache", lambda: held.update(kept=held["allocated"]() is not None))
    monkeypatch.setattr(launcher.torch.cuda, "mem_get_info", lambda device: (1000, 1000))

    class Others(Solo):
        """Who share the GPU, and look at its memory when they have met."""

        def allgather(self, value):
            assert not held["kept"]
            return [value]

    assert launcher.device_memory(Others(), launcher.Location("here", 0, 1), device) == 900


def test_what_rank_0_refuses_every_rank_refuses():
    def refuse():
        raise InputError("no")

    with pytest.raises(InputError, match="^no$"):
        mpi.on_first_rank(Solo(), refuse)
    with pytest.raises(InputError, match="^no$"):
        mpi.on_every_rank(Solo(), refuse)
    assert mpi.on_first_rank(Solo(), lambda: 5, share=False) == 5


def test_the_planner_hears_of_the_tightest_rank(monkeypatch, tmp_path):
    monkeypatch.setattr(launcher.memory, "free_nbytes", lambda: 400)
    place, cpu = launcher.Location("here", 0, 2), launcher.torch.device("cpu")
    found = launcher.machine(config.load(None, RUN), Solo(), place, cpu)
    assert (found.device, found.memory_nbytes, found.cpu_memory_nbytes, found.scratch_nbytes) == ("cpu", 180, 180, None)
    asked = config.load(None, RUN | {"cache": {"disk": 100}, "scratch": str(tmp_path)})
    assert launcher.machine(asked, Solo(), place, cpu).scratch_nbytes > 0


def test_a_scratch_folder_that_is_none_is_refused_where_it_is_needed(tmp_path):
    place, cpu = launcher.Location("here", 0, 1), launcher.torch.device("cpu")
    nowhere = RUN | {"scratch": str(tmp_path / "nowhere")}
    launcher.machine(config.load(None, nowhere), Solo(), place, cpu)
    with pytest.raises(launcher.InputError, match="nowhere is not a folder on here: name a folder"):
        launcher.machine(config.load(None, nowhere | {"cache": {"disk": 100}}), Solo(), place, cpu)


def test_scratch_is_the_schedulers_folder_before_the_outputs(monkeypatch, tmp_path):
    for name in ("SLURM_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    output = RUN | {"output": str(tmp_path / "o.h5")}
    assert launcher.scratch_folder(config.load(None, output)) == tmp_path
    monkeypatch.setenv("SLURM_TMPDIR", "/local")
    assert str(launcher.scratch_folder(config.load(None, output))) == "/local"
    assert str(launcher.scratch_folder(config.load(None, output | {"scratch": "/mine"}))) == "/mine"
