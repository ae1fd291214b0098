"""Plans for a model of 750 GB, published in FP8, on nodes of H200s: what is said of 1, 2, 4 and 8 of them."""

from pathlib import Path

import pytest

from noria import config
from noria.checkpoint.random_weights import random_checkpoint
from noria.errors import InputError
from noria.limits import STORED_PAIRS
from noria.plan import costs, planner, rates
from noria.plan.loads import load_of
from noria.plan.problem import Machine, Problem
from noria.plan.rounds import Workload

RATES = Path(__file__).parent / "data" / "noria-rates-h200.toml"
GLM_5 = {
    "architectures": ["GlmMoeDsaForCausalLM"],
    "model_type": "glm_moe_dsa",
    "hidden_size": 6144,
    "num_hidden_layers": 78,
    "num_attention_heads": 64,
    "vocab_size": 154880,
    "tie_word_embeddings": False,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}
PUBLISHED = 753e9  # bytes, with a layer for drafts (10 GB), which Noria leaves out
WORK = Workload(256, 512, 64)


@pytest.fixture(scope="module")
def model():
    return random_checkpoint(GLM_5, "bfloat16")


def planned(made, ranks, **flags):
    known = rates.read(RATES)
    machine = Machine("cuda", int(known.device_capacity), int(known.host_capacity))
    run = config.load(None, {"model": "m", "prompts": "p", "output": "o"} | flags)
    problem = Problem(run, made.shape, made.blocks, "bfloat16", ranks, machine, WORK.num_rows, WORK)
    return planner.make(problem, known)


def test_its_bytes_are_those_it_is_published_in(model):
    assert model.nbytes == pytest.approx(PUBLISHED - 10e9, rel=0.006)


def test_what_a_node_cannot_hold_is_told_with_the_numbers_and_the_remedy(model):
    for ranks in (1, 2):
        with pytest.raises(InputError, match=r"weights do not fit: .* GiB of .* GiB .*placement.stage"):
            planned(model, ranks, random_weights="c", model=None)


@pytest.mark.slow
def test_a_plan_says_what_it_takes_on_1_2_4_and_8_gpus(model):
    speeds, on_disk = [], []
    for ranks in (1, 2, 4, 8):
        plan = planned(model, ranks)
        held = [{tier: its.get("weights", 0) for tier, its in of_rank.items()} for of_rank in plan.memory]
        assert sum(sum(tiers.values()) for tiers in held) == pytest.approx(model.nbytes, rel=0.001)
        for of_rank in plan.memory:
            assert sum(of_rank["gpu"].values()) <= rates.read(RATES).device_capacity
            assert sum(of_rank["cpu"].values()) <= rates.read(RATES).host_capacity
        on_disk.append(sum(tiers.get("disk", 0) for tiers in held))
        speeds.append(plan.predicted["tokens_per_second"])
        words = "\n".join(plan.lines())
        assert all(f"rank {rank}: " in words for rank in range(ranks)) and "predicted" in words
    capacity = sum(int(getattr(rates.read(RATES), name)) for name in ("device_capacity", "host_capacity"))
    assert [nbytes > 0 for nbytes in on_disk] == [model.nbytes > 0.9 * ranks * capacity for ranks in (1, 2, 4, 8)]
    assert speeds == sorted(speeds) and speeds[3] > 50 * speeds[0]


def test_experts_of_few_rows_cost_less_than_decoding_them(model):
    """64 tokens of GLM-5 make 2 pairs an expert, 16,384 make 512, whose weights are decoded before."""
    known = rates.read(RATES)
    run = config.load(None, {"model": "m", "prompts": "p", "output": "o", "groups": 8, "microbatch_tokens": 16384})
    machine = Machine("cuda", int(known.device_capacity), int(known.host_capacity))
    problem = Problem(run, model.shape, model.blocks, "bfloat16", 8, machine, WORK.num_rows, WORK)
    plan, share = planner.make(problem, known), model.shape.experts_share
    load = load_of(plan, problem.cut(plan.laps), 0)
    few, many = (
        costs.resources(plan, model.shape, load, known, costs.Round(rows, 600, chunk_tokens=tokens))
        for rows, tokens in ((8 * 64, 0), (0, 8 * 16384))
    )
    assert share * 64 < STORED_PAIRS < share * 16384
    assert few["decoding"] < many["decoding"] / 2 and few["matmul"] < many["matmul"] / 100
