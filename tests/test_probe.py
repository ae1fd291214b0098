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


def test_a_cpus_memory_is_what_products_of_one_row_read_and_the_largest_product_takes_no_longer_than_it_may(
    monkeypatch,
):
    its = Probe(Solo(), Location("host", 0, 1), torch.device("cpu"), Path(), Effort(0.12, 1 << 20))
    asked = []

    def timed(work, seconds):
        rows = work.args[1].shape[0]
        asked.append((rows, seconds))
        return [5e-3 + rows * 1e-4, 1e-3 + rows * 1e-4]  # seconds of a call

    monkeypatch.setattr(its, "_timed", timed)
    monkeypatch.setattr(its, "_uncached", lambda nbytes: 1)
    found = its.measure(("loopback", None), groups={"memory"}, dtypes=["float32"])
    assert found.device_memory == found.host_memory == pytest.approx(4 * 2048**2 / 1.1e-3)
    assert found.host_to_device != found.device_memory / 2
    assert asked == [(1, 0.12), *((rows, 0.012) for rows in (1, 4, 8, 16, 32, 64, 256))]  # 27 ms of 20, of 120 in all
    assert found.matmul_rows["float32"][256] == pytest.approx(2 * 256 * 2048**2 / 26.6e-3)


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
