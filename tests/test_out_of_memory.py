"""A rank whose memory does not suffice for a microbatch cuts finer, says so, and changes no token."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import noria.engine.stage
import noria.models.llama
import small_run
from counts import some
from late_streams import LateStreams
from noria import streams
from noria.__main__ import main
from noria.borders import halved, largest, refined, rest_refined
from shortages import Shortage

FLOAT64 = ["--dtype", "float64"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = small_run.write_files(tmp_path_factory.mktemp("memory"))
    assert main(small_run.command(folder, "undisturbed.h5", *FLOAT64)) == 0
    return folder


def of_a_library(message):
    """As torch raises it where cuBLAS finds no memory for itself."""
    return RuntimeError(f"CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`: {message}")


def run_out(monkeypatch, name, limit, argument, error=torch.OutOfMemoryError):
    """The model's function `name` has no memory for more rows of hidden states than `limit`; returns what it was given."""
    function, given = getattr(noria.models.llama, name), []

    def limited(*arguments):
        given.append(len(arguments[argument]))
        if given[-1] > limit:
            raise error(f"no room for {given[-1]}")
        return function(*arguments)

    monkeypatch.setattr(noria.models.llama, name, limited)
    return given


def test_a_step_that_memory_does_not_hold_is_cut_finer_and_gives_the_same_tokens(folder, monkeypatch, capsys):
    given = run_out(monkeypatch, "layer", 10, 3)
    assert main(small_run.command(folder, "finer.h5", *FLOAT64, "--laps", "2")) == 0
    assert small_run.rows_of(folder / "finer.h5") == small_run.rows_of(folder / "undisturbed.h5")
    said = capsys.readouterr().err
    assert (
        "rank=0/1 out of memory with 36 tokens in a microbatch: this rank continues with 2 microbatches of at most 18"
        in said
    )
    assert said.count("out of memory") == 2, "36 -> 18 -> 9, and 9 from then on"
    assert [count for count in given if count > 10] == [36, 18]


PLACES = [[], ["--cache", "cpu=100"], ["--activations", "cpu"], ["--activations", "cpu", "--cache", "gpu=40,cpu=60"]]
CELLS = itertools.product(range(3), range(3), ["sequential", "single_batch", "multi_batch"], PLACES)
CELLS = [
    cell for cell in CELLS if not (cell[1] == 2 and cell[3] is PLACES[3])
]  # of rows of one tier there a single one


@pytest.mark.slow
@pytest.mark.parametrize(("layer", "microbatch", "schedule", "place"), some(CELLS))
def test_what_is_done_of_a_layer_is_not_done_again_where_memory_fails_in_any_microbatch_of_every_step(
    folder, monkeypatch, capsys, layer, microbatch, schedule, place
):
    # Every step begins with whole microbatches again, so that each of them is cut.
    monkeypatch.setattr(
        noria.engine.stage.Stage, "_most_tokens", property(lambda _: None, lambda *_: None), raising=False
    )
    monkeypatch.setattr(streams, "streams_of", LateStreams)
    keys = [*FLOAT64, "--microbatches", "3", "--schedule", schedule, "--groups", "1", *place, "--scratch", folder]
    shortage = Shortage(noria.models.llama.layer, layer, microbatch)
    monkeypatch.setattr(noria.models.llama, "layer", shortage)
    assert main(small_run.command(folder, "cut.h5", *keys, "--overwrite")) == 0
    assert small_run.rows_of(folder / "cut.h5") == small_run.rows_of(folder / "undisturbed.h5")
    tokens = small_run.NUM_ROWS * (3 + 24 - 1)  # of the prompts, and all that were generated but for the last
    assert shortage.computed == dict.fromkeys(range(3), tokens)
    few = place is PLACES[3]  # rows of two tiers never share a microbatch
    assert capsys.readouterr().err.count("out of memory with") == shortage.failures >= (1 if few else 12)


def test_logits_that_memory_does_not_hold_are_computed_for_fewer_rows(folder, monkeypatch, capsys):
    given = run_out(monkeypatch, "head", 4, 2)
    assert main(small_run.command(folder, "logits.h5", *FLOAT64)) == 0
    assert small_run.rows_of(folder / "logits.h5") == small_run.rows_of(folder / "undisturbed.h5")
    assert "out of memory: logits of 3 rows at a time from now on" in capsys.readouterr().err
    assert max(given) == 12 and sum(count > 4 for count in given) == 2


@pytest.mark.parametrize(("name", "limit", "argument"), [("layer", 10, 3), ("head", 4, 2)])
def test_a_library_that_finds_no_memory_for_itself_is_given_less_to_do(
    folder, monkeypatch, capsys, name, limit, argument
):
    run_out(monkeypatch, name, limit, argument, of_a_library)
    assert main(small_run.command(folder, f"{name}.h5", *FLOAT64)) == 0
    assert small_run.rows_of(folder / f"{name}.h5") == small_run.rows_of(folder / "undisturbed.h5")
    assert "out of memory" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "argument"), [("layer", 3), ("head", 2)])
def test_an_error_that_is_not_of_memory_ends_the_run_at_once(folder, monkeypatch, capsys, name, argument):
    given = run_out(monkeypatch, name, 0, argument, RuntimeError)
    assert main(small_run.command(folder, f"{name}_fails.h5", *FLOAT64)) == 1
    assert len(given) == 1 and "failed: RuntimeError: no room for " in capsys.readouterr().err


def test_memory_that_does_not_hold_one_row_ends_the_run(folder, monkeypatch, capsys):
    run_out(monkeypatch, "layer", 2, 3)
    assert main(small_run.command(folder, "nothing.h5", *FLOAT64)) == 1
    said = capsys.readouterr().err
    assert "failed: OutOfMemoryError: no room for 3" in said
    assert "out of memory with a row in each microbatch, 3 tokens at most: lower pipeline.microbatch_tokens" in said


def test_a_draw_that_memory_does_not_hold_is_made_for_fewer_rows(folder, monkeypatch, capsys):
    drawing = ["--temperature", "0.8", "--top-p", "0.9", "--logprobs", "2", "--seed", "3"]
    assert main(small_run.command(folder, "drawn.h5", *FLOAT64, *drawing)) == 0
    sample, given = noria.engine.stage.Sampler.sample, []

    def limited(self, logits, *arguments):
        found = sample(self, logits, *arguments)
        given.append(len(logits))
        if given[-1] > 4:
            raise torch.OutOfMemoryError(f"no room for {given[-1]}")
        return found

    monkeypatch.setattr(noria.engine.stage.Sampler, "sample", limited)
    capsys.readouterr()
    assert main(small_run.command(folder, "fewer.h5", *FLOAT64, *drawing)) == 0
    assert small_run.rows_of(folder / "fewer.h5") == small_run.rows_of(folder / "drawn.h5")
    assert "out of memory: logits of 3 rows at a time from now on" in capsys.readouterr().err
    assert max(given) == 12 and sum(count > 4 for count in given) == 2


@given(st.lists(st.integers(1, 9), min_size=1, max_size=20), st.integers(1, 30))
def test_refined_borders_keep_rows_whole_and_in_order_and_below_the_limit(counts, most):
    finer = refined([0, len(counts)], counts, most)
    assert finer[0] == 0 and finer[-1] == len(counts) and finer == sorted(set(finer))
    for first, last in itertools.pairwise(finer):
        assert last - first == 1 or sum(counts[first:last]) <= most
    assert refined([0, len(counts)], counts, None) == [0, len(counts)]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=20), st.data())
def test_from_the_microbatch_on_that_failed_all_are_cut_to_its_half_and_those_before_it_stay(counts, data):
    inner = data.draw(st.sets(st.integers(1, len(counts)), max_size=5)) - {len(counts)}
    borders = [0, *sorted(inner), len(counts)]
    failed = data.draw(st.integers(0, len(borders) - 2))
    finer, rows = rest_refined(borders, counts, failed), borders[failed + 1] - borders[failed]
    assert finer[: failed + 1] == borders[: failed + 1] and set(borders) <= set(finer) and finer == sorted(set(finer))
    rest = list(itertools.pairwise(finer[failed:]))
    assert (finer == borders) == all(last - first == 1 for first, last in itertools.pairwise(borders[failed:]))
    if rows > 1:
        most = max(sum(counts[first:last]) for first, last in rest[:2])
        assert all(last - first == 1 or sum(counts[first:last]) <= most for first, last in rest)


def test_halving_ends_with_a_row_each():
    assert halved([0, 5, 6]) == [0, 2, 5, 6]
    assert halved([0, 1, 2]) == [0, 1, 2]
    assert largest([0, 2, 5], [1, 2, 3, 4, 5]) == 12
