"""What is wrong is said by its own name, and hints lead to something that works."""

import gzip
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import small_run
from noria.__main__ import main
from noria.commands.probe import _figure
from noria.engine.sampler import Sampler
from noria.errors import InputError
from noria.output.export import check_target
from noria.plan import rates
from noria.step import NO_TOKEN, NONE_LEFT, Admitted


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = small_run.write_files(tmp_path_factory.mktemp("said"))
    assert main(small_run.command(folder, "run.h5")) == 0
    return folder


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"repetition_penalty": 1e-308}, ["repetition_penalty 1e-308"]),
        ({"repetition_penalty": 1e-308, "temperature": 0.0}, ["repetition_penalty 1e-308"]),
        (
            {"allowed_token_ids": [9], "stop_token_ids": [9], "min_new_tokens": 2, "ignore_eos": False},
            ["allowed_token_ids [9]", "min_new_tokens 2"],
        ),
    ],
)
def test_a_row_whose_own_settings_leave_no_token_is_told_which(folder, settings, named):
    rows = [{"token_ids": [5, 6, 7]} | settings, {"token_ids": [5, 6, 7]}]
    (folder / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = small_run.command(folder, "bad.h5", "--prompts", folder / "bad.jsonl", "--dtype", "float64", "--overwrite")
    assert main(run) == 0
    assert main(["export", str(folder / "bad.h5"), str(folder / "bad_out.jsonl")]) == 0
    first, second = map(json.loads, (folder / "bad_out.jsonl").read_text().splitlines())
    assert (first["status"], second["status"]) == ("error", "done")
    assert "no token is left after " in first["error"] and "not finite" not in first["error"]
    assert all(words in first["error"] for words in named) and "temperature" not in first["error"]


def test_logits_that_are_not_finite_and_settings_that_leave_nothing_are_told_apart():
    sampler = Sampler(torch.device("cpu"))
    settings = {"temperature": 0.0, "logit_bias": {"0": -np.inf, "1": -np.inf}}
    admitted = tuple(Admitted(slot, (), settings) for slot in range(2))
    sampler.apply(SimpleNamespace(released=(), admitted=admitted))
    logits = torch.tensor([[1.0, 2.0], [torch.nan, 1.0]])
    drawn = sampler.sample(logits, np.arange(2), np.zeros(2), np.zeros(2, np.int64))
    assert drawn.token_ids.tolist() == [NONE_LEFT, NO_TOKEN]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "A.JSONL.GZ", "two.dots.jsonl.gz"])
def test_json_lines_may_be_packed_and_hold_the_same(folder, name):
    assert main(["export", str(folder / "run.h5"), str(folder / "plain.jsonl")]) == 0
    for _ in range(2):
        assert main(["export", str(folder / "run.h5"), str(folder / name)]) == 0
        packed = (folder / name).read_bytes()
        assert gzip.decompress(packed) == (folder / "plain.jsonl").read_bytes() and packed[4:8] == bytes(4)


@pytest.mark.parametrize(
    ("name", "said"),
    [("a.csv.gz", "a.jsonl"), ("a.parquet.gz", "a.jsonl"), ("b.json.zst", "b.jsonl"), (".x", "rows.jsonl")],
)
def test_the_name_that_is_proposed_is_one_that_works(tmp_path, name, said):
    with pytest.raises(InputError, match=f"name the file {said}$"):
        check_target(tmp_path / name)
    check_target(tmp_path / said)


def test_a_machine_that_is_a_folder_is_told_so(tmp_path):
    with pytest.raises(
        InputError, match=f"machine {tmp_path} is a folder: name the file that noria probe --output FILE made"
    ):
        rates.read(tmp_path)


@pytest.mark.parametrize(
    ("value", "unit", "said"),
    [
        (3e9, "flop/s", "3 GFLOP/s"),
        (4.2e7, "flop/s", "0.042 GFLOP/s"),
        (7.58e14, "flop/s", "758 TFLOP/s"),
        (1.234e12, "flop/s", "1.23 TFLOP/s"),
        (5.5e10, "B/s", "55.00 GB/s"),
        (3.1e6, "B/s", "3.1 MB/s"),
    ],
)
def test_no_figure_of_a_probe_is_rounded_to_nothing(value, unit, said):
    assert _figure(value, unit) == said


def test_staging_that_stages_nothing_is_said(folder, capsys):
    assert main(small_run.command(folder, "staged.h5", "--stage")) == 0
    assert "note: placement.stage does nothing: no weights are on disk" in capsys.readouterr().err
    assert main(small_run.command(folder, "plain.h5")) == 0
    assert "placement.stage" not in capsys.readouterr().err
