"""A run that does otherwise than its plan says so, and fails under --strict."""

import small_run
from noria import run as program
from noria.__main__ import main
from noria.engine.timing import figures
from noria.plan.plan import Plan


def timing(**changed):
    names = ("prefill_seconds", "prefill_rounds", "prefill_tokens", "decode_seconds", "decode_rounds", "decode_tokens")
    return dict.fromkeys(names, 10) | {"peak_device_nbytes": 1, "peak_host_nbytes": 2} | changed


def test_figures_are_those_of_the_slowest_rank_and_leave_out_phases_of_few_rounds():
    found = figures([timing(decode_seconds=5), timing(decode_seconds=20, prefill_rounds=2)], speeds=True)
    assert found["decode_tokens_per_second"] == 0.5 and found["peak_host_nbytes"] == [2, 2]
    assert "prefill_tokens_per_second" in figures([timing()], speeds=True)
    assert "prefill_tokens_per_second" not in figures([timing(prefill_rounds=2)], speeds=True)
    assert "prefill_tokens_per_second" not in figures([timing(prefill_seconds=0.9)], speeds=True)
    assert "decode_tokens_per_second" not in figures([timing()], speeds=False)


def test_a_run_that_does_otherwise_warns_and_fails_under_strict(tmp_path, monkeypatch, capsys):
    folder = small_run.write_files(tmp_path)
    assert main(small_run.command(folder, "as_planned.h5")) == 0
    assert "not as planned" not in capsys.readouterr().err
    monkeypatch.setattr(Plan, "compare", lambda plan, measured: ["decode: 1 tok/s, predicted 2"])
    assert main(small_run.command(folder, "warned.h5")) == 0
    assert "warning: not as planned: decode: 1 tok/s, predicted 2" in capsys.readouterr().err
    assert main(small_run.command(folder, "strict.h5", "--strict")) == program.NOT_AS_PLANNED
    assert "error: not as planned" in capsys.readouterr().err
    assert [row[1] for row in small_run.rows_of(folder / "strict.h5")] == ["done"] * small_run.NUM_ROWS
