"""Headers of one run agree, though one was written before there was a key that the other has."""

import json

import pytest

import small_run
from noria.__main__ import main
from noria.output.agreement import differing
from noria.output.generations import open_generations
from noria.output.parts import Parts, parts_folder
from noria.sampling import Sampling

HEADER = {"prompts": "ab", "dtype": "float32", "sampling.top_k": 3, "sampling.top_p": 0.9}


def without(header, *names):
    return {name: value for name, value in header.items() if name not in names}


def test_a_missing_key_is_at_its_default():
    assert (
        differing(without(HEADER, "sampling.top_p"), HEADER | {"sampling.top_p": Sampling().override({}).top_p}) == []
    )
    assert differing(HEADER | {"sampling.min_p": Sampling().override({}).min_p}, HEADER) == []
    assert differing(HEADER | {"sampling.stop": None, "shard": "1/1", "rules": 1}, HEADER) == []


def test_a_missing_key_that_the_other_has_otherwise_is_a_difference():
    assert differing(without(HEADER, "sampling.top_k"), HEADER) == ["sampling.top_k"]
    assert differing(HEADER | {"shard": "1/2", "rules": 2}, HEADER) == ["shard", "rules"]
    assert differing(HEADER | {"of a later version": 0.5}, HEADER) == ["of a later version"]
    assert differing(HEADER, without(HEADER, "prompts")) == ["prompts"]


def test_a_name_that_may_differ_is_left_out():
    assert differing(HEADER, HEADER | {"dtype": "float64"}, but=("dtype",)) == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_run.write_files(tmp_path_factory.mktemp("agreement"))


def test_parts_and_outputs_of_a_version_with_fewer_keys_go_on(folder, capsys):
    """An output of today as a version without min_p would have written it: finished, and as a part of an unfinished one."""
    assert main(small_run.command(folder, "whole.h5")) == 0
    with open_generations(folder / "whole.h5") as file:
        rows, header = list(file.rows()), json.loads(file.attrs["header"])
    parts = Parts(folder / "old.h5", without(header, "sampling.min_p"))
    for row in rows[:5]:
        parts.add(row)
    parts.seal()
    assert main(small_run.command(folder, "old.h5", "--min-p", "0.1")) == 2
    assert "sampling.min_p: 0.0 in part-000000.h5, 0.1 now" in capsys.readouterr().err
    assert main(small_run.command(folder, "old.h5")) == 0
    assert small_run.rows_of(folder / "old.h5") == small_run.rows_of(folder / "whole.h5")
    assert not parts_folder(folder / "old.h5").exists()
