"""Sizes of steps that adapt to a prefill which is not as fast as planned: with a clock of the test's own, and in whole runs."""

from types import SimpleNamespace

import numpy as np
import pytest

import small_run
from noria import config
from noria.__main__ import main
from noria.desk import step_sizes
from noria.desk.step_sizes import StepSizes, adapting
from noria.step import Step, Word

MOST = 4096


class Prompts:
    """An admission with prompts without end, and so many rows that decode in each group; a step takes what `seconds` says."""

    def __init__(self, seconds, decoding=0, left=1 << 40):
        self.step_tokens, self.now = MOST, 0.0
        self._seconds, self._decoding, self._left = seconds, decoding, left
        self.sizes = []

    def compose(self, round, group):
        chunk = min(self.step_tokens - self._decoding, self._left)
        self._left -= chunk
        counts = np.array([1] * self._decoding + [chunk] * (chunk > 0), np.int32)
        self.now += self._seconds(int(counts.sum()))
        self.sizes.append(int(counts.sum()))
        no = np.zeros(len(counts), np.int32)
        return Step(round, group, Word.RUN, (), (), no, counts, no, np.zeros(counts.sum(), np.int32))


def adapted(prompts, planned, groups=2, rounds=60):
    """What a run of such prompts says, and its size of steps at the end."""
    said = []
    plan = SimpleNamespace(groups=groups, predicted={"prefill": {"tokens_per_second": planned}})
    steps = StepSizes(prompts, plan, said.append, lambda: prompts.now)
    for round in range(rounds):
        for group in range(groups):
            steps.compose(round, group)
    return said, prompts.step_tokens


def rate(tokens_per_second, cliff=None):
    """Seconds of a step at this speed, at a quarter of it from `cliff` tokens on."""
    return lambda tokens: tokens / tokens_per_second * (4 if cliff and tokens > cliff else 1)


def test_steps_stay_as_planned_where_prefill_is_as_planned():
    for speed in (1000, 800, 1240):
        assert adapted(Prompts(rate(speed)), 1000) == ([], MOST)


def test_steps_get_smaller_where_that_is_faster():
    said, size = adapted(Prompts(rate(1024, cliff=1500)), 1000)
    assert size == 1024
    tried = "256.0 with 4,096, 256.0 with 2,048, 1,024 with 1,024, 1,024 with 512, 1,024 with 256"
    assert said == [
        f"steps of 1,024 tokens from now on: prefill does {tried} a step (tok/s), where 1,000 were predicted"
    ]


def test_two_smaller_sizes_that_are_no_faster_end_the_search_at_the_planned_size():
    prompts = Prompts(rate(500))
    said, size = adapted(prompts, 1000)
    assert size == MOST and set(prompts.sizes) == {4096, 2048, 1024}
    tried = "500.0 with 4,096, 500.0 with 2,048, 500.0 with 1,024"
    assert said == [
        f"steps of 4,096 tokens from now on: prefill does {tried} a step (tok/s), where 1,000 were predicted"
    ]
    assert adapted(Prompts(rate(2000)), 1000)[1] == MOST


def test_slow_first_steps_of_a_run_are_not_taken_for_a_wrong_size():
    first = [True] * 5

    def seconds(tokens):
        return tokens / (500 if first and first.pop() else 1000)

    prompts = Prompts(seconds)
    assert adapted(prompts, 1000) == ([], MOST) and set(prompts.sizes) == {MOST}


def test_a_half_that_is_slower_ends_the_search():
    prompts = Prompts(lambda tokens: (tokens + MOST / 2) / 700)
    said, size = adapted(prompts, 1000)
    assert size == MOST and set(prompts.sizes) == {MOST, MOST // 2} and len(said) == 1


def test_a_half_that_is_faster_is_kept_and_its_halves_tried():
    prompts = Prompts(rate(1000, cliff=3000))
    said, size = adapted(prompts, 1000)
    assert size == 2048 and set(prompts.sizes) == {4096, 2048, 1024, 512} and len(said) == 1
    assert max(prompts.sizes) == MOST, "no step is larger than there is memory for"


def test_few_rounds_or_short_ones_or_such_of_decode_say_nothing():
    assert adapted(Prompts(rate(500)), 1000, rounds=3) == ([], MOST)
    assert adapted(Prompts(rate(1e9)), 1000) == ([], MOST)  # a second of full rounds never comes
    assert adapted(Prompts(rate(500), left=2 * MOST), 1000) == ([], MOST)
    assert adapted(Prompts(rate(100), decoding=40, left=0), 1000) == ([], MOST)
    assert adapted(Prompts(rate(500), decoding=40, left=4 * (MOST - 40)), 1000) == ([], MOST)  # two rounds, then decode


def test_a_step_is_not_made_smaller_than_twice_its_decoding_rows():
    prompts = Prompts(rate(500), decoding=1100)
    said, size = adapted(prompts, 1000)
    assert size == MOST and set(prompts.sizes) == {4096} and len(said) == 1


def test_a_size_that_the_user_asked_for_stays():
    prompts = Prompts(rate(1))
    assert (
        adapting(config.load(None, {"model": "m", "prompts": "p", "output": "o", "step_tokens": 512}), None, None)(
            prompts
        )
        is prompts
    )


@pytest.mark.slow
@pytest.mark.parametrize("groups", ["1", "3"])
def test_rows_are_the_same_whatever_sizes_a_run_comes_to(tmp_path, capsys, monkeypatch, groups):
    small_run.write_files(tmp_path)
    (tmp_path / "prompts.jsonl").write_text(
        "".join(f'{{"id": "{row}", "token_ids": {[5 + row % 9] * 60}}}\n' for row in range(120))
    )
    flags = ["--dtype", "float64", "--groups", groups, "--max-new-tokens", "3", "--cache", "gpu=64 pages"]
    assert main(small_run.command(tmp_path, "fixed.h5", *flags, "--step-tokens", "64")) == 0
    monkeypatch.setattr(step_sizes, "SECONDS", 0.0)
    monkeypatch.setattr(step_sizes, "ROUNDS", 1)
    monkeypatch.setattr(step_sizes, "LEAST_TOKENS", 64)
    monkeypatch.setattr(step_sizes, "FULL", 0.05)
    monkeypatch.setattr(step_sizes, "BETTER", 0.0)
    monkeypatch.setattr(step_sizes, "SLOWER", 0.0)
    monkeypatch.setattr(step_sizes, "OFF", -1.0)
    capsys.readouterr()
    assert main(small_run.command(tmp_path, "adapted.h5", *flags)) == 0
    assert "tokens from now on: prefill does " in capsys.readouterr().err
    assert small_run.rows_of(tmp_path / "adapted.h5") == small_run.rows_of(tmp_path / "fixed.h5")
