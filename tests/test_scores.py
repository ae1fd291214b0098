"""Log-probabilities in outputs: of tokens, of the most likely ids beside them, of prompts; parts to merged output."""

import h5py
import numpy as np
import pytest

from noria.errors import InputError
from noria.output.generations import open_generations
from noria.output.merge import merge
from noria.output.parts import Parts
from noria.output.summary import summary_of
from output_rows import as_tuple, fill, make_row


def scored_row(row, top, prompt=False, dtype=np.float32, sample=0):
    random = np.random.default_rng(row)
    one = make_row(row, sample, num_tokens=row % 4 + 1)
    count = len(one.token_ids)
    one.logprobs = -random.random(count).astype(dtype)
    if top:
        one.top_ids = random.integers(0, 100, (count, top)).astype(np.int32)
        one.top_logprobs = -random.random((count, top)).astype(dtype)
    if prompt:
        one.prompt_token_ids = np.arange(5, dtype=np.int32)
        one.prompt_logprobs = np.array([np.nan, -1, -2, -3, -4], dtype)
    return one


def same(a, b):
    assert as_tuple(a) == as_tuple(b)
    for name in ("top_ids", "top_logprobs", "prompt_logprobs"):
        mine, other = getattr(a, name), getattr(b, name)
        assert (mine is None) == (other is None), name
        assert mine is None or np.array_equal(mine, other, equal_nan=True), name


@pytest.mark.parametrize("rows_a_part", [1, 3, 20])
def test_every_row_reads_back_with_as_many_of_the_most_likely_ids_as_it_asked_for(tmp_path, rows_a_part):
    rows = [scored_row(row, top=[3, 0, 5][row % 3], prompt=row % 2 == 0) for row in range(7)] + [make_row(7)]
    parts = Parts(tmp_path / "out.h5", {})
    fill(parts, rows[::-1], rows_a_part)
    merge(parts, tmp_path / "out.h5", 8, {})
    with open_generations(tmp_path / "out.h5") as file:
        for mine, read in zip(rows, file.rows(), strict=True):
            same(mine, read)
    assert "logprobs    float32, of tokens, top 5, of prompts" in summary_of(tmp_path / "out.h5", verify=True).lines(
        everything=True
    )


def test_h5py_alone_reads_them_beside_the_tokens(tmp_path):
    rows = [scored_row(0, 2, True, np.float64), scored_row(1, 0)]
    parts = Parts(tmp_path / "out.h5", {})
    fill(parts, rows)
    merge(parts, tmp_path / "out.h5", 2, {})
    with h5py.File(tmp_path / "out.h5") as file:
        assert file["top_ids"].shape == file["top_logprobs"].shape == (len(file["tokens"]), 2)
        assert file["logprobs"].dtype == file["prompt_logprobs"].dtype == np.float64
        assert len(file["prompt_logprobs"]) == len(file["prompt_tokens"])
        assert file["top_ids"][0].tolist() == rows[0].top_ids[0].tolist()
        assert (file["top_ids"][1:] == -1).all() and np.isnan(file["top_logprobs"][1:]).all()


def test_columns_that_do_not_fit_each_other_are_damage(tmp_path):
    parts = Parts(tmp_path / "out.h5", {})
    fill(parts, [scored_row(0, 2)])
    path = next(parts.folder.iterdir())
    with h5py.File(path, "r+") as file:
        values = file["top_logprobs"][:, :1]
        del file["top_logprobs"]
        file["top_logprobs"] = values
    with pytest.raises(InputError, match="top_logprobs has rows of 1 values"):
        open_generations(path)
    with h5py.File(path, "r+") as file:
        del file["top_logprobs"]
    with pytest.raises(InputError, match="top_logprobs is missing"):
        open_generations(path)
