"""noria probe on this machine: alone, and under mpirun."""

from pathlib import Path

import pytest
import torch

import world
from mpirun import describe
from noria.__main__ import main
from noria.launch import launcher
from noria.launch.launcher import Location
from noria.launch.mpi import Solo
from noria.launch.probe import Effort, Probe
from noria.plan import rates

QUICK = ["--seconds", "0.01", "--megabytes", "1", "--device", "cpu"]


def test_a_probe_alone_measures_all_but_messages(tmp_path, capsys):
    path = tmp_path / "machine.toml"
    assert main(["probe", *QUICK, "--output", str(path), "--scratch", str(tmp_path)]) == 0
    found = rates.read(path)
    assert found.device == "CPU" and set(found.assumed) == {"hop", "hop_seconds"}
    assert sorted(found.matmul) == sorted(["float64", "float32", "bfloat16", "float16"])
    out = capsys.readouterr().out
    assert "host_to_device" in out and "disk_read" in out and f"written         {path}" in out
    assert [file.name for file in tmp_path.iterdir()] == ["machine.toml"]


@pytest.mark.parametrize(("ranks", "free", "number"), [(1, 512, 32), (8, 512, 4), (1, 4, 16), (2, 0.01, 4)])
def test_the_matrices_of_all_ranks_are_more_than_caches_hold_and_a_small_part_of_memory(
    monkeypatch, ranks, free, number
):
    monkeypatch.setattr(launcher, "host_memory", lambda location: int(free * 2**30))
    its = Probe(Solo(), Location("host", 0, ranks), torch.device("cpu"), Path(), Effort(0.01))
    assert its._uncached(2048**2 * 4) == number


@pytest.mark.slow
@pytest.mark.world
def test_a_probe_of_ranks_measures_messages_too(tmp_path):
    path = tmp_path / "machine.toml"
    result = world.command(2, ["probe", *QUICK, "--output", path, "--scratch", tmp_path])
    assert result.returncode == 0, describe(result)
    assert rates.read(path).assumed == () and result.stdout.count("disk_read") == 1
    assert "mpi_device" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--seconds", "0"], "--seconds is 0: it must be above 0"),
        (["--scratch", "/nowhere/at/all"], "--scratch /nowhere/at/all is not a folder"),
        (["--output", "/tmp"], "--output /tmp is a folder: name a file"),
    ],
)
def test_a_probe_that_cannot_be_is_refused(arguments, said, capsys):
    assert main(["probe", *QUICK, *arguments]) == 2
    assert said in capsys.readouterr().err
