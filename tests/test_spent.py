"""Where the time of a run went: shares of its ranks' time, of measured rates, and the table of them."""

import itertools
import json
import re

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

import counts
import small_run
import tiny_models
from noria.__main__ import main
from noria.engine.timing import work_of
from noria.output import opened
from noria.plan.rates import Rates
from noria.report.facts import facts_of
from noria.report.spent import Spread, spent, table_lines
from noria.step import Step

PLAN = {"groups": 4, "dtype": "bfloat16"}
RATES = Rates(device_memory=4e12, host_to_device=50e9, hop=100e9, matmul={"bfloat16": 600e12})
TIMING = {
    "seconds": [20.0, 20.0],
    "prefill_seconds": [10.0, 10.0], "prefill_rounds": [8, 8], "prefill_tokens": [4000, 4000], "prefill_sampled": [9, 9],
    "prefill_watched_seconds": [5.0, 5.0], "prefill_compute_seconds": [4.0, 3.0], "prefill_idle_input_seconds": [0.5, 1.5],
    "prefill_idle_weights_seconds": [0.0, 0.0], "prefill_idle_cache_seconds": [0.0, 0.0], "prefill_flops": [3e15, 1.5e15],
    "prefill_memory_nbytes": [4e12, 4e12], "prefill_host_to_gpu_nbytes": [0, 0], "prefill_rank_to_rank_nbytes": [1e12, 0],
    "decode_seconds": [8.0, 10.0], "decode_rounds": [100, 100], "decode_tokens": [990, 990], "decode_sampled": [991, 991],
    "decode_watched_seconds": [2.0, 2.0], "decode_compute_seconds": [1.0, 0.5], "decode_idle_input_seconds": [0.25, 0.5],
    "decode_idle_weights_seconds": [0.5, 0.5], "decode_idle_cache_seconds": [0.0, 0.25], "decode_flops": [1e12, 1e12],
    "decode_memory_nbytes": [16e12, 20e12], "decode_host_to_gpu_nbytes": [200e9, 400e9],
    "decode_rank_to_rank_nbytes": [1e9, 0],
}  # fmt: skip


def arrays(timing, ranks=slice(None)):
    return {name: np.array(values, float)[ranks] for name, values in timing.items()}


def test_shares_of_the_ranks_time_and_of_measured_rates():
    found = spent(PLAN, arrays(TIMING), RATES)
    prefill, decode = found.phases
    assert (found.rate, found.generated, found.computed, found.one_pass) == (50.0, 1000, 4990, 0.2)  # 1 / (1 + 4)
    assert found.bubble == pytest.approx((10 * 0.2 + 10 * 0.1875) / 20)
    assert prefill.shares["computing"] == Spread(0.6, pytest.approx(0.7), 0.8)
    assert prefill.shares["waiting for input"] == Spread(0.1, pytest.approx(0.2), 0.3)
    assert decode.shares["waiting for weights"] == Spread(0.25, 0.25, 0.25)
    assert decode.shares["host, not hidden"] == Spread(0.125, 0.125, 0.125)
    assert prefill.used["memory bandwidth"] == Spread(0.1, 0.1, 0.1)
    assert prefill.used["peak FLOP/s"] == Spread(0.25, pytest.approx(0.375), 0.5)
    assert prefill.used["link to next rank"].most == 1.0 and decode.used["link to next rank"].most < 0.01
    streamed = spent(PLAN, arrays(TIMING | {"decode_host_to_gpu_nbytes": [200e9, 550e9]}), RATES)
    assert (
        streamed.phases[1].used["link to the GPU"].most == 1.1 and len(streamed.phases[1].used) == 3
    )  # the busiest link
    assert decode.used["memory bandwidth"] == Spread(0.5, pytest.approx(0.5), 0.5)


def test_the_table_is_short_and_says_what_a_phase_of_one_step_is():
    lines = list(table_lines(spent(PLAN, arrays(TIMING | {"prefill_rounds": [1, 1]}), RATES)))
    assert lines[0] == "50.0 tokens/s: 1,000 tokens generated, 4,990 computed in 20 s on 2 ranks"
    assert lines[1].split("  ")[0] == "share of the time" and "prefill 10 s, one step" in lines[1]
    assert lines[-1] == "bubble (waiting for input) 19 %; one pass, (N-1)/(N-1+M), N = 2, M = 4: 20 %"
    assert [line[:20].strip() for line in lines[3:-1]] == [
        "computing", "waiting for input", "waiting for weights", "waiting for cache", "host, not hidden",
        "memory bandwidth", "peak FLOP/s", "link to next rank",
    ]  # fmt: skip
    assert len(lines) == 12 and all(len(line) <= 80 for line in lines)


def test_of_one_rank_the_table_has_one_column_a_phase_and_no_bubble():
    lines = list(table_lines(spent(PLAN, arrays(TIMING, slice(1)), RATES)))
    assert not any("bubble" in line or "least" in line for line in lines) and len(lines) < 11
    assert next(line for line in lines if line.startswith("computing")).split() == ["computing", "80", "%", "50", "%"]


def test_rates_that_are_assumed_and_shares_of_nothing_are_left_out():
    rates = Rates(assumed=("device_memory", "matmul.bfloat16", "hop", "host_to_device"))
    nothing = {
        f"{phase}_idle_{name}_seconds": [0.0, 0.005] for phase in ("prefill", "decode") for name in ("cache", "weights")
    }
    found = spent(PLAN, arrays(TIMING | nothing), rates)
    assert not any(one.used for one in found.phases)
    assert [line[:20].strip() for line in table_lines(found)][3:-1] == [
        "computing",
        "waiting for input",
        "host, not hidden",
    ]


@pytest.mark.parametrize("case", counts.some(range(400)))
def test_any_timings_give_a_table_that_fits(case):
    """Ranks, times and counts of any size: 12 lines of 80 characters; shares of the time are 100 % together."""
    rng = np.random.default_rng(case)
    ranks = int(rng.choice([1, 2, 64]))
    timing = {
        name: 10.0 ** rng.uniform(-3, 5, ranks) * (rng.random() > 0.2)
        if name.endswith("seconds")
        else np.full(ranks, float(rng.integers(1, 10 ** rng.integers(1, 6))))
        for name in TIMING
    }
    found = spent(PLAN, timing, RATES)
    lines = list(table_lines(found)) if found else []
    assert len(lines) <= 12 and all(len(line) <= 80 for line in lines), lines
    for one in found.phases if found else ():
        if one.shares:
            assert sum(spread.mean for spread in one.shares.values()) == pytest.approx(1)


def test_the_work_of_steps_is_that_of_their_rows_one_by_one():
    steps = [
        Step(0, 0, positions=np.array([4, 0, 7]), counts=np.array([1, 5, 3]), token_ids=np.zeros(9), borders=np.array([0, 2, 3])),
        Step(0, 1),
    ]  # fmt: skip
    pairs = sum(at + 1 for first, count in ((4, 1), (0, 5), (7, 3)) for at in range(first, first + count))
    assert work_of(steps) == {"tokens": 9, "passes": 2, "sampled": 0, "scored": 0, "seen": 5 + 5 + 10, "pairs": pairs}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = small_run.write_files(tmp_path_factory.mktemp("spent"))
    machine = folder / "machine.toml"
    machine.write_text('device = "CPU"\ndevice_memory = 1e9\n[matmul]\nfloat32 = 1e9\n')
    flags = ["--weights", "cpu=100", "--step-tokens", "8", "--dtype", "float32", "--machine", machine]
    assert main(small_run.command(folder, "out.h5", *flags)) == 0
    return folder / "out.h5"


def test_a_run_has_its_flops_as_torch_counts_them_and_its_bytes(run):
    """Token by token, transformers' eager attention computes no pair that a causal mask hides."""
    with opened.open(run) as rows:
        timing = rows.timings()
        texts = [(row.prompt_token_ids.tolist(), row.token_ids.tolist()) for row in rows]
    model = AutoModelForCausalLM.from_pretrained(run.parent / "hf", attn_implementation="eager").eval()
    prompt, new = texts[0]
    cache, counter = None, FlopCounterMode(display=False)
    with counter, torch.inference_mode():
        for place, token_id in enumerate([*prompt, *new[:-1]]):
            hidden = model.model(torch.tensor([[token_id]]), past_key_values=cache, use_cache=True)
            cache = hidden.past_key_values
            if place >= len(prompt) - 1:
                model.lm_head(hidden.last_hidden_state)
    flops = counter.get_total_flops() * len(texts)  # all rows are as long
    assert timing["prefill_flops"][0] + timing["decode_flops"][0] == pytest.approx(
        flops, rel=0.01
    )  # norms are counted too
    state = tiny_models.state(tiny_models.LLAMA)
    weights = sum(value.nbytes for name, value in state.items() if "embed" not in name)
    seen = sum(range(len(prompt), len(prompt) + len(new)))  # by decoding rows, and once by each prompt
    read = timing["decode_passes"][0] * weights + timing["decode_host_to_gpu_nbytes"][0]
    cached = timing["decode_seen"][0] * 2 * 2 * 8 * 4 * 3  # keys and values, heads, their numbers, bytes, layers
    assert timing["decode_memory_nbytes"][0] == pytest.approx(read + cached, rel=0.01)
    assert seen * len(texts) == timing["decode_seen"][0] + timing["prefill_seen"][0] or timing["prefill_rounds"][0] > 1


def test_a_chunk_of_one_token_is_prefill_unless_it_is_the_last_of_its_prompt(run):
    """Which takes a token and samples one, as a row that decodes does."""
    output = run.parent / "ones.h5"
    assert main(small_run.command(run.parent, output, "--step-tokens", 1, "--max-new-tokens", 2)) == 0
    with opened.open(output) as rows:
        timing, prompts = rows.timings(), [len(row.prompt_token_ids) for row in rows]
    assert set(prompts) == {3} and timing["prefill_rounds"][0] == 2 * len(prompts) == timing["prefill_tokens"][0]
    assert timing["decode_rounds"][0] == 2 * len(prompts)


def test_report_and_inspect_tell_where_the_time_went(run, capsys):
    assert main(["inspect", "--json", str(run)]) == 0
    told = json.loads(capsys.readouterr().out)["time"]
    assert (
        told["ranks"] == 1
        and "bubble" not in told
        and told["tokens_per_second"] == pytest.approx(288 / told["seconds"])
    )
    for phase in ("prefill", "decode"):
        assert sum(mean for _, mean, _ in told[phase]["shares"].values()) == pytest.approx(1)
        assert 0 < told[phase]["shares"]["computing"][1] < 1
        assert 0 < told[phase]["of_measured_rates"]["peak FLOP/s"][1] < 1
    assert told == facts_of(run).spent.as_dict()
    assert main(["report", str(run)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"where the time went\n  [\d.,]+ tokens/s: 288 tokens generated, ", said)
    assert main(["report", str(run), "--html", str(run.parent / "out.html")]) == 0
    page = (run.parent / "out.html").read_text()
    assert "<h2>Where the time went</h2>" in page and ">computing</th>" in page


def test_a_share_that_cannot_be_is_left_out():
    """Rows that share a beginning read it together, and it is counted for each of them."""
    found = spent(PLAN, arrays(TIMING | {"decode_memory_nbytes": [50e12, 60e12]}), RATES)
    assert [("memory bandwidth" in one.used, "peak FLOP/s" in one.used) for one in found.phases] == [
        (True, True),
        (False, True),
    ]


def test_only_changes_of_rates_change_shares():
    """A rate that is half as fast is used twice as much; shares of the time stay."""
    half = Rates(device_memory=2e12, host_to_device=25e9, hop=50e9, matmul={"bfloat16": 300e12})
    pairs = itertools.zip_longest(spent(PLAN, arrays(TIMING), RATES).phases, spent(PLAN, arrays(TIMING), half).phases)
    for one, other in pairs:
        assert one.shares == other.shares and list(one.used) == list(other.used)
        assert all(2 * one.used[name].mean == pytest.approx(other.used[name].mean) for name in one.used)
