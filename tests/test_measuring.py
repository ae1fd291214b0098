"""The rates of a run: measured once for a kind of node, kept, stored in the output, and measured again where they must be."""

import json
import os
import subprocess
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from measuring_worker import work

import small_run
import world
from forks import forked
from mpirun import describe
from noria import run as program
from noria.config import load
from noria.errors import InputError
from noria.launch import copies, measuring
from noria.launch.copies import IN_FLIGHT, sustained
from noria.launch.disk_rates import disk_rates
from noria.launch.here import ThisRank
from noria.launch.launcher import Location
from noria.launch.mpi import Solo
from noria.launch.probe import Effort, Probe
from noria.output.generations import open_generations
from noria.output.stored_rates import store_rates
from noria.plan import kept, rates
from noria.plan.rates import DOUBTED, Node
from noria.streams import streams_of

CPU = torch.device("cpu")
HERE = ThisRank(Solo(), Location("host", 0, 1), streams_of(CPU))


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """rates_of_run of a run of one rank; `calls`: (groups, dtypes) that it measured each time."""
    monkeypatch.setenv("NORIA_CACHE", str(tmp_path / "kept"))
    calls, measure = [], Probe.measure

    def counted(probe, transport, groups, dtypes):
        calls.append((sorted(groups), list(dtypes)))
        return measure(probe, transport, groups=groups, dtypes=dtypes)

    monkeypatch.setattr(Probe, "measure", counted)
    monkeypatch.setattr(measuring, "EFFORTS", {"cpu": Effort(0.001, 1 << 20, strict=False)})

    def call(dtype="float32", disk=False, **keys):
        run = load(None, {"model": "m.h5", "prompts": "p.jsonl", "output": str(tmp_path / "run.h5"), **keys})
        found, said = measuring.rates_of_run(run, HERE, dtype, disk, "loopback")
        call.said += said
        return found

    call.calls, call.said = calls, []
    return call


ALL = ["launches", "link", "memory"]


def test_a_run_measures_once_what_its_plan_needs_and_another_dtype_or_a_disk_beside_it(measured, tmp_path):
    first = measured()
    assert {"hop", "disk_read", "matmul.float64"} <= set(first.assumed) and "host_memory" not in first.assumed
    assert first.node.ranks == 1 and first.matmul_rows["float32"]
    assert measured() == first and measured.calls == [(ALL, ["float32"])]
    assert measured("float64").matmul["float32"] == first.matmul["float32"]
    assert measured("float64", disk=True).scratch == measuring.mount_of(tmp_path)
    assert measured.calls[1:] == [([], ["float64"]), (["disk"], [])]
    assert measured("float32").host_memory == first.host_memory and len(measured.calls) == 3
    said = "\n".join(measured.said)
    assert said.count("rates: CPU, 1 rank a host, measured in ") == 3 and f"{tmp_path}/kept/noria-rates-cpu-x1-" in said
    assert measured("float32", disk=True, scratch="/proc").disk_read and measured.calls[3] == (["disk"], [])


def test_what_cannot_be_measured_is_assumed_and_the_run_goes_on(measured, monkeypatch):
    def fails(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Probe, "_matmul", fails)
    monkeypatch.setattr("noria.launch.probe.Buffers", fails)
    assert {"host_to_device", "host_memory", "matmul.float32"} <= set(measured().assumed)


def test_rates_older_than_a_month_or_doubted_are_measured_again(measured, tmp_path):
    def change(**values):
        (path,) = (tmp_path / "kept").iterdir()
        path.write_text(replace(rates.read(path), **values).to_toml())

    measured()
    change(measured="2020-01-01T00:00:00Z")
    assert measured().measured > "2026" and len(measured.calls) == 2
    change(standing=DOUBTED)
    assert measured().standing != DOUBTED and len(measured.calls) == 3 and measured.calls[2] == (ALL, ["float32"])
    measured()
    assert len(measured.calls) == 3


def test_a_run_goes_on_with_the_rates_that_its_output_began_with(measured, tmp_path):
    own = replace(measured(), host_memory=3.21e9)
    folder = tmp_path / "run.h5.parts"
    folder.mkdir()

    def store(known):
        text = json.dumps({"format": "noria-segment", "rates": known.to_toml()})
        (folder / "segment-000000.json").write_text(text)

    store(own)
    assert measured().host_memory == 3.21e9
    assert measured(overwrite=True).host_memory != 3.21e9
    for other in (replace(own, standing=DOUBTED), replace(own, node=Node(8)), replace(own, device="NVIDIA H200")):
        store(other)
        assert measured().host_memory != 3.21e9
    store(own)
    store_rates(tmp_path / "run.h5", replace(own, host_memory=6.54e9).to_toml())
    assert measured().host_memory == 6.54e9, "what a job that stopped has changed"
    (folder / "segment-000000.json").write_text('{"format": "noria-segment", "rates": "host_memory = nan"}')
    assert measured().host_memory != 3.21e9 and len(measured.calls) == 1


def test_a_machine_file_of_another_device_or_count_is_used_and_named(measured, tmp_path):
    path = tmp_path / "machine.toml"
    path.write_text(replace(rates.assumed("NVIDIA A100"), assumed=(), node=Node(8)).to_toml())
    assert measuring._otherwise("m", rates.read(path), "NVIDIA A100-SXM4-80GB", Node(8)) == []
    assert len(measuring._otherwise("m", rates.read(path), "NVIDIA A100-SXM4-40GB", Node(8))) == 1
    assert measured(machine=str(path)).device == "NVIDIA A100 80GB" and measured.calls == []
    said = "\n".join(measured.said)
    assert f"warning: {path} is of NVIDIA A100 80GB, the ranks have CPU" in said
    assert f"warning: {path} was measured with 8 ranks a host, here are 1" in said


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({}, False),
        ({"decode_tokens_per_second": 110.0}, False),
        ({"decode_tokens_per_second": 120.0}, True),
        ({"prefill_tokens_per_second": 840.0}, True),
    ],
)
def test_a_phase_that_is_more_than_15_percent_off_makes_rates_doubtful(found, said):
    predicted = {"assumed": [], "device": "NVIDIA H200"}
    predicted |= {"prefill": {"tokens_per_second": 1000.0}, "decode": {"tokens_per_second": 100.0}}
    assert measuring.deviates(SimpleNamespace(predicted=predicted), found) == said
    for other in ({"assumed": ["hop"]}, {"device": "CPU"}):
        assert not measuring.deviates(SimpleNamespace(predicted=predicted | other), found)


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize(("seconds", "standing"), [(10.0, "checked"), (20.0, DOUBTED)])
def test_a_run_that_deviates_leaves_doubts_in_its_output_and_where_its_rates_are_kept(
    tmp_path, monkeypatch, complete, seconds, standing
):
    monkeypatch.setenv("NORIA_CACHE", str(tmp_path / "kept"))
    known = replace(rates.assumed("cuda"), assumed=(), node=Node(1, 1), measured="2026-11-29T00:00:00Z")
    kept.keep(tmp_path / "kept", known, datetime.now(UTC))
    (tmp_path / "run.h5.parts").mkdir()
    segment = tmp_path / "run.h5.parts" / "segment-000000.json"
    segment.write_text(json.dumps({"format": "noria-segment", "rates": known.to_toml()}))
    stored = []
    desk = SimpleNamespace(complete=complete, close=lambda attrs, _: stored.append(attrs["rates"]), leave=lambda: None)
    predicted = {"assumed": [], "device": "NVIDIA H200", "prefill": {"tokens_per_second": 1}}
    plan = SimpleNamespace(predicted=predicted | {"decode": {"tokens_per_second": 100.0}})
    timing = {
        "prefill_rounds": 0,
        "prefill_seconds": 0.0,
        "decode_rounds": 9,
        "decode_tokens": 1000,
        "decode_seconds": seconds,
    }
    timing |= {"peak_device_nbytes": 0, "peak_host_nbytes": 0}
    run = load(None, {"model": "m.h5", "prompts": "p.jsonl", "output": str(tmp_path / "run.h5")})
    program._end(desk, run, plan, known, {}, [timing])
    (one,) = kept.all_kept(tmp_path / "kept")
    text = stored[0] if complete else json.loads(segment.read_text())["rates"]
    assert one.rates.standing == rates.parse(text).standing == standing


class Link:
    """Streams of a link that copies one after another on each lane, `seconds` each, and knows how many were waiting."""

    def __init__(self, seconds, clock):
        self.seconds, self.clock, self.ends, self.most = seconds, clock, {}, {}

    def copy(self, lane, pairs):
        ends = self.ends.setdefault(lane, [])
        ends.append(max([self.clock(), *ends[-1:]]) + self.seconds[lane])
        self.most[lane] = max(self.most.get(lane, 0), sum(end > self.clock() for end in ends))
        end = ends[-1]
        return SimpleNamespace(query=lambda: self.clock() >= end, synchronize=lambda: None)


def test_a_link_is_measured_with_copies_always_on_their_way_in_each_direction(monkeypatch):
    now = 0.0

    def clock():
        nonlocal now
        now += 1e-4  # what the host takes to look: a link that waited for it would be 10 % slower
        return now

    monkeypatch.setattr("time.perf_counter", clock)
    seconds, data = {"load": 1e-3, "store": 2e-3}, torch.zeros(1000, dtype=torch.uint8)
    assert sustained(Link(seconds, lambda: now), {"load": (data, data)}, 0.5) == pytest.approx(1e6, rel=0.01)
    link = Link(seconds, lambda: now)
    both = sustained(link, {"load": (data, data), "store": (data, data)}, 0.5)
    assert both == pytest.approx(0.5e6, rel=0.01), "the slower direction's"
    assert link.most == {"load": IN_FLIGHT, "store": IN_FLIGHT}


def test_what_is_page_locked_is_unlocked_where_there_is_no_memory_for_all_buffers(monkeypatch):
    locked = []

    class Memory(copies.HostMemory):
        def register(self, device):
            if locked:
                raise OSError("the limit of locked memory")
            locked.append(self)

        def close(self):
            if self in locked:
                locked.remove(self)
            return super().close()

    monkeypatch.setattr(copies, "HostMemory", Memory)
    with pytest.raises(OSError, match="the limit"):
        copies.Buffers(4096, CPU)
    assert not locked


def test_a_disk_without_room_to_be_measured_is_named_without_a_tier_that_nobody_asked_for(tmp_path, monkeypatch):
    full = SimpleNamespace(f_bavail=3, f_frsize=4096)
    monkeypatch.setattr("os.statvfs", lambda folder: full)
    with pytest.raises(InputError) as caught:
        disk_rates(tmp_path, 0.01, 1)
    assert str(caught.value) == (
        f"scratch folder {tmp_path} needs 0.03 GiB, 0.00 GiB are free, 33542144 bytes too few:"
        " set placement.scratch to a larger disk"
    )


def test_copies_go_through_the_whole_blocks_of_a_buffer_in_turn(monkeypatch):
    monkeypatch.setattr(copies, "BLOCK_NBYTES", 1000)
    there, host = torch.zeros(3500, dtype=torch.uint8), torch.ones(3500, dtype=torch.uint8)
    assert sustained(streams_of(CPU), {"load": (there, host)}, 0.001) > 0
    assert bool(there[:3000].all()) and not bool(there[3000:].any())
    assert sustained(streams_of(CPU), {"load": (there[3000:], host[3000:])}, 0.001) > 0 and bool(there.all())


@pytest.mark.slow
@pytest.mark.world
def test_ranks_measure_together_and_all_plan_with_the_same(tmp_path):
    found = world.call(2, work, tmp_path)
    assert len({text for text, _ in found}) == 1 and rates.parse(found[0][0]).node.ranks == 2
    assert all(name.startswith("matmul.") for name in rates.parse(found[0][0]).assumed)
    assert rates.parse(found[0][0]).transport == "mpi_device"
    assert all(seconds < 3 for _, seconds in found)
    (path,) = (path for path in tmp_path.iterdir() if path.suffix == ".toml")
    assert path.read_text() == found[0][0]


@pytest.mark.slow
def test_a_run_stores_its_rates_in_its_output(tmp_path):
    small_run.write_files(tmp_path)
    variables = os.environ | {"NORIA_CACHE": str(tmp_path / "kept")}
    command = forked(["noria", *small_run.command(tmp_path, "run.h5")])
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and "rates: CPU, 1 rank a host, measured in " in done.stderr, describe(done)
    with open_generations(tmp_path / "run.h5") as file:
        text = file.attrs["rates"]
    (one,) = kept.all_kept(tmp_path / "kept")
    assert text == Path(one.path).read_text()
