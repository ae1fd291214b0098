"""Rates that jobs keep for later ones: where, for which kind of node, how long, and what happens where that cannot be."""

import os
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from noria.plan import kept, rates
from noria.plan.rates import CONFIRMED, DOUBTED, Node

NOW = datetime(2026, 11, 29, 14, tzinfo=UTC)
NODE = Node(2, 1, 16, "580.95.05", "Xeon")
MEASURED = replace(
    rates.assumed("cuda"),
    device="NVIDIA H200",
    assumed=(),
    node=NODE,
    transport="mpi_device",
    measured="2026-11-28T14:00:00Z",
)


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"NORIA_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/noria"),
        ({"NORIA_CACHE": "", "XDG_CACHE_HOME": ""}, "/out"),
        ({}, "/out"),
    ],
)
def test_rates_are_kept_where_the_user_says_else_beside_the_output_and_never_at_home(monkeypatch, variables, folder):
    for name in ("NORIA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert kept.folder_of("/out/run.h5") == Path(folder)


def test_kept_rates_are_found_for_their_kind_of_node_alone(tmp_path):
    folder = tmp_path / "made" / "when needed"
    one = kept.keep(folder, MEASURED, NOW)
    assert [path.name for path in folder.iterdir()] == [one.path.name] and one.path.name.startswith(
        "noria-rates-nvidia-h200-x2-"
    )
    assert kept.find(folder, "NVIDIA H200", replace(NODE)).rates == MEASURED
    others = [
        replace(NODE, **other)
        for other in ({"ranks": 8}, {"driver": "570"}, {"cpu": "EPYC"}, {"cores": 4}, {"hosts": 2})
    ]
    assert [kept.find(folder, "NVIDIA H200", other) for other in others] == [None] * 5
    assert kept.find(folder, "NVIDIA H100", NODE) is None
    for other in others:
        kept.keep(folder, replace(MEASURED, node=other), NOW)
    assert len(list(folder.iterdir())) == 6, "a file for each kind"


def test_of_jobs_that_start_together_the_first_ones_rates_are_those_of_all(tmp_path):
    first, second = MEASURED, replace(MEASURED, host_to_device=1e9)
    assert kept.keep(tmp_path, first, NOW).rates == first
    assert kept.keep(tmp_path, second, NOW).rates == first == kept.find(tmp_path, "NVIDIA H200", NODE).rates
    assert [path.suffix for path in tmp_path.iterdir()] == [".toml"], "nothing else is left"


@pytest.mark.parametrize("links", [True, False])
def test_what_is_old_doubted_or_has_less_is_replaced(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError(1, "no links here")))
    kept.keep(tmp_path, replace(MEASURED, assumed=("disk_read", "disk_write")), NOW)
    assert kept.keep(tmp_path, MEASURED, NOW).rates.assumed == ()
    later = NOW + timedelta(days=31)
    again = replace(MEASURED, hop=1e11, measured="2026-12-30T14:00:00Z")
    assert kept.keep(tmp_path, again, later).rates.hop == 1e11
    assert kept.doubt(tmp_path, again, later).standing == DOUBTED
    third = replace(again, hop=2e11)
    assert kept.keep(tmp_path, third, later).rates.hop == 2e11 and len(list(tmp_path.iterdir())) == 1


def test_rates_are_good_for_a_month_unless_a_run_deviated(tmp_path):
    assert kept.is_good(MEASURED, NOW) and not kept.is_good(MEASURED, NOW + timedelta(days=31))
    assert not kept.is_good(replace(MEASURED, standing=DOUBTED), NOW)
    assert kept.is_good(replace(MEASURED, measured=""), NOW + timedelta(days=1000)), "somebody's own file"
    assert not kept.is_good(replace(MEASURED, measured="yesterday"), NOW)
    assert not kept.is_good(MEASURED, NOW - timedelta(days=31)), "a node's clock was wrong"


def test_rates_that_are_the_same_when_measured_again_are_not_doubted_again(tmp_path):
    old = replace(MEASURED, standing=DOUBTED)
    assert kept.standing_of(old, replace(MEASURED, hop=1.1 * MEASURED.hop)).standing == CONFIRMED
    assert kept.standing_of(old, replace(MEASURED, hop=1.2 * MEASURED.hop)).standing != CONFIRMED
    assert kept.standing_of(MEASURED, MEASURED).standing != CONFIRMED
    confirmed = replace(MEASURED, standing=CONFIRMED)
    kept.keep(tmp_path, confirmed, NOW)
    assert kept.doubt(tmp_path, confirmed, NOW) == confirmed == kept.find(tmp_path, "NVIDIA H200", NODE).rates


def test_a_doubt_marks_those_rates_and_no_others(tmp_path):
    kept.keep(tmp_path, MEASURED, NOW)
    kept.doubt(tmp_path, replace(MEASURED, measured="2026-11-01T00:00:00Z"), NOW)
    assert kept.find(tmp_path, "NVIDIA H200", NODE).rates.standing != DOUBTED, "those are other rates by now"
    kept.doubt(tmp_path, MEASURED, NOW)
    assert kept.find(tmp_path, "NVIDIA H200", NODE).rates.standing == DOUBTED


def test_a_folder_that_cannot_be_written_or_read_is_silent(tmp_path, capfd):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "folder"):
        assert kept.keep(folder, MEASURED, NOW) is None and kept.find(folder, "NVIDIA H200", NODE) is None
    assert capfd.readouterr() == ("", "")


def test_files_that_are_damaged_or_no_files_are_left_out(tmp_path):
    (tmp_path / "noria-rates-a.toml").write_text("hop = nan\n")
    (tmp_path / "noria-rates-b.toml").write_bytes(b"\xff\0")
    (tmp_path / "noria-rates-c.toml").mkdir()
    os.mkfifo(tmp_path / "noria-rates-d.toml")
    (tmp_path / "machine.toml").write_text(MEASURED.to_toml())
    assert kept.all_kept(tmp_path) == []
    one = kept.keep(tmp_path, MEASURED, NOW)
    assert [found.path for found in kept.all_kept(tmp_path)] == [one.path]


def test_somebodys_own_file_in_that_folder_comes_first(tmp_path):
    kept.keep(tmp_path, MEASURED, NOW)
    (tmp_path / "noria-rates-site.toml").write_text('device = "NVIDIA H200"\nhop = 1e9\n')
    assert kept.find(tmp_path, "NVIDIA H200", NODE).rates.hop == 1e9


def test_a_plan_takes_those_of_as_many_ranks_else_the_latest_of_its_kind_of_device(tmp_path):
    cpu = replace(rates.assumed("cpu"), assumed=(), node=Node(4, 1), measured="2026-11-29T00:00:00Z")
    two, four = (
        replace(MEASURED, node=replace(NODE, ranks=ranks), measured=f"2026-11-2{ranks}T00:00:00Z") for ranks in (2, 4)
    )
    for one in (cpu, two, four):
        kept.keep(tmp_path, one, NOW)
    assert [kept.for_plan(tmp_path, "cuda", ranks).rates for ranks in (2, 4, 8)] == [two, four, four]
    assert kept.for_plan(tmp_path, "cpu", 2).rates == cpu
    assert kept.for_plan(tmp_path / "nowhere", "cuda", 2) is None
