"""A written plan on two ranks: the run has it, says so, and stores what kept each rank busy."""

import json

import pytest

import small_run
import world
from noria.__main__ import main
from noria.output import opened
from noria.report.measured import terms

pytestmark = [pytest.mark.world, pytest.mark.slow]


def test_two_ranks_run_a_written_plan_and_measure_their_messages(tmp_path, capsys):
    small_run.write_files(tmp_path)
    path, flags = tmp_path / "run2.toml", ["--laps", "1", "--step-tokens", "16", "--weights", "gpu=50,cpu=50"]
    command = [
        "plan",
        "--ranks",
        "2",
        "--write",
        str(path),
        "--json",
        *small_run.command(tmp_path, "out.h5", *flags)[1:],
    ]
    assert main(command) == 0
    told = json.loads(capsys.readouterr().out)
    done = world.command(2, ["run", str(path)])
    assert done.returncode == 0 and "plan: as noria plan wrote it" in done.stderr, done.stderr
    assert "rates: CPU" in done.stderr
    with opened.open(tmp_path / "out.h5") as rows:
        timing, plan = rows.timings(), json.loads(rows.attrs["plan"])
    assert plan["stages"] == told["plan"]["stages"] and plan["weight_tiers"] == told["plan"]["weight_tiers"]
    assert (timing["decode_watched_rounds"] >= 3).all() and (timing["decode_compute_seconds"] > 0).all()
    assert timing["decode_hops_seconds"][0] > 0, "rank 0 sends hidden states"
    assert timing["decode_hops_seconds"][1] == 0, "the last rank of one lap sends none"
    assert {"decode, ring", "decode, compute", "decode, link"} <= {one.name for one in terms(plan, timing, None)}
    three = world.command(3, ["run", str(path), "--overwrite"])
    assert three.returncode == 2 and "it needs 3 (ranks x laps) with sum 3 (layers)" in three.stderr
