import dataclasses

import pytest

from noria import config
from noria.blocks import ModelShape, lay_out, layer_name
from noria.config import InputError
from noria.plan import planner
from noria.plan.planner import GiB, Machine

SHAPE = ModelShape("llama", 8, 1024, 16, 4, 64, 32000, 2048, False)


def blocks(dtype="bfloat16"):
    layer = {"qkv": (1536, 1024), "out": (1024, 1024), "gate_up": (8192, 1024), "down": (1024, 4096)}
    names = {layer_name(number): layer for number in range(SHAPE.num_layers)}
    ends = {"embed": {"tokens": (32000, 1024)}, "head": {"norm": (1024,), "lm_head": (32000, 1024)}}
    return {name: lay_out(name, shapes, dtype) for name, shapes in (ends | names).items()}


def make(num_ranks=1, machine=Machine("cuda", 20 * GiB), rows=10_000, dtype="bfloat16", **flags):
    run = config.load(None, {"model": "m", "prompts": "p", "output": "o", **flags})
    return planner.make(run, SHAPE, blocks(), dtype, num_ranks, machine, rows)


def test_the_plan_fills_the_memory_it_was_given_and_no_more():
    for num_ranks in (1, 2, 3):
        plan = make(num_ranks)
        used = [sum(memory["gpu"].values()) for memory in plan.memory]
        page = plan.memory[used.index(max(used))]["gpu"]["cache"] / plan.num_pages
        assert max(used) <= 20 * GiB < max(used) + page


def test_the_weights_of_the_ranks_are_the_models_bytes_in_the_runs_dtype():
    total = sum(block.nbytes for block in blocks().values())
    for dtype, factor in (("bfloat16", 1), ("float32", 2), ("float64", 4)):
        plan = make(3, dtype=dtype, laps=2)
        assert sum(memory["gpu"]["weights"] for memory in plan.memory) == pytest.approx(total * factor, rel=0.001)


def test_a_few_rows_get_no_more_pages_than_they_can_use():
    assert make(rows=3).num_pages == 3 * 2048 // 16


@pytest.mark.parametrize(
    ("num_ranks", "device", "flags", "groups"),
    [
        (1, "cpu", {}, 1),
        (1, "cuda", {}, 2),
        (3, "cuda", {}, 4),
        (3, "cuda", {"blocking": True}, 3),
        (2, "cpu", {"groups": 7}, 7),
    ],
)
def test_groups_keep_the_ring_full_unless_they_are_asked_for(num_ranks, device, flags, groups):
    assert make(num_ranks, Machine(device, 20 * GiB), **flags).groups == groups


def test_memory_that_does_not_suffice_is_refused_with_the_numbers_and_the_remedy():
    with pytest.raises(
        InputError,
        match=r"gpu tier needs .* GiB, the limit is 100\.0 MiB: use more ranks.*rank 0 .*work space 0\.\d GiB",
    ):
        make(gpu_memory="100MiB")


def test_a_limit_above_what_the_device_has_is_refused():
    with pytest.raises(InputError, match=r"gpu_memory is 30\.0 GiB, but the tightest rank has 20\.0 GiB"):
        make(gpu_memory="30GiB")


@pytest.mark.parametrize(
    ("num_ranks", "flags", "said"),
    [
        (3, {"laps": 3}, "9 virtual stages .* for 8 layers: use at most 8"),
        (2, {"blocking": True, "groups": 3}, "3 groups on 2 ranks deadlocks"),
        (1, {"blocking": True}, "1 groups on 1 rank deadlocks"),
        (1, {"step_tokens": 8, "microbatch_tokens": 9}, "microbatch_tokens is 9, more than pipeline.step_tokens"),
        (2, {"partition": [5, 2]}, "has 2 numbers with sum 7"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(num_ranks, flags, said):
    with pytest.raises(InputError, match=said):
        make(num_ranks, **flags)


def test_a_plan_prints_every_rank_with_its_layers():
    lines = make(2, laps=2).lines()
    assert len(lines) == 4 and "layers 0-1, 4-5" in lines[1] and "layers 2-3, 6-7" in lines[2]


def test_a_plan_is_plain_data():
    plan = make(2)
    assert planner.Plan(**{f.name: plan.as_dict()[f.name] for f in dataclasses.fields(plan)}) == plan
