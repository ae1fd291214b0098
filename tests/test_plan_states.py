"""Plans for a family with states: memory holds as many states as rows, and what each layer leaves is counted."""

import pytest

from noria import config
from noria.arrays import Array, keys_and_values
from noria.blocks import lay_out, layer_name
from noria.model import ModelShape
from noria.plan import costs, planner
from noria.plan.costs import Round, Workload
from noria.plan.planner import GiB
from noria.plan.problem import Machine, Problem

STATE = (Array("state", (16, 128, 128), "sequence", "float32"),)  # 1 MiB
MACHINE = Machine("cuda", 20 * GiB, 64 * GiB, 512 * GiB)


def shape_of(*cache):
    return ModelShape("llama", len(cache), 1024, 16, 4, 64, 32000, 2048, False, cache=cache)


HYBRID = shape_of(*[STATE, STATE, keys_and_values(4, 64)] * 3)
RECURRENT = shape_of(*[STATE] * 6)


def make(shape, num_ranks=1, machine=MACHINE, load=Workload(5000, 400, 100), **flags):
    layer = {"qkv": (1536, 1024), "out": (1024, 1024), "gate_up": (8192, 1024), "down": (1024, 4096)}
    names = {layer_name(number): layer for number in range(shape.num_layers)}
    names |= {"embed": {"tokens": (32000, 1024)}, "head": {"norm": (1024,), "lm_head": (32000, 1024)}}
    blocks = {name: lay_out(name, shapes, "bfloat16") for name, shapes in names.items()}
    run = config.load(None, {"model": "m", "prompts": "p", "output": "o"} | flags)
    return planner.make(Problem(run, shape, blocks, "bfloat16", num_ranks, machine, load.num_rows, load))


@pytest.mark.parametrize("shape", [HYBRID, RECURRENT], ids=["hybrid", "recurrent"])
@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("cache", [None, {"cpu": 100.0}, {"gpu": 30.0, "cpu": 30.0, "disk": 40.0}])
def test_every_tier_holds_the_states_of_as_many_rows_as_it_has_pages_for(shape, num_ranks, cache):
    plan = make(shape, num_ranks, **({"cache": cache} if cache else {}))
    page, state = (
        [shape.cache_nbytes(plan.ranges()[rank::num_ranks], "bfloat16", per) for rank in range(num_ranks)]
        for per in ("token", "sequence")
    )
    held = {tier: pools for tier, pools in plan.pools.items() if pools["pages"]}
    assert set(held) == set(cache or {"gpu"})
    for tier, pools in held.items():
        assert pools["states"] == -(-pools["pages"] // 32) + 1  # a row of 500 tokens has 32 pages
        for rank in range(num_ranks):
            wanted = pools["pages"] * 16 * page[rank] + pools["states"] * state[rank]
            assert plan.memory[rank][tier]["cache"] == wanted
    assert all(sum(memory["gpu"].values()) <= 20 * GiB for memory in plan.memory)
    assert plan.predicted["rows"] <= sum(pools["states"] for pools in held.values())


def test_no_more_rows_are_counted_than_there_are_states():
    """40 rows of 8 pages and 24 of 4 have 6.5 on average, and states are counted for 7."""
    plan = make(HYBRID, load=Workload(64, 60, 42.5, total_pages=416, longest_pages=8, whole=True))
    assert plan.of_pool("states")["gpu"] < 64 and plan.predicted["rows"] <= plan.of_pool("states")["gpu"]


def test_the_plan_says_how_many_states_there_are():
    plan = make(HYBRID)
    assert plan.lines()[0].endswith(f"tokens and {plan.pools['gpu']['states']:,} states")
    assert "states" not in make(shape_of(keys_and_values(4, 64))).lines()[0]


def test_the_samples_of_a_prompt_have_a_state_each_and_one_for_their_beginning():
    pools = make(HYBRID, load=Workload(4000, 400, 100), n=4).pools["gpu"]
    assert pools["states"] == -(-pools["pages"] // (4 * 32)) * 5 + 1


def test_a_microbatch_has_no_more_rows_than_their_states_may_take():
    plan = make(HYBRID)
    assert plan.state_rows == 320  # 1 MiB each of 320 MiB
    assert make(HYBRID, load=Workload(9, 400, 100)).state_rows == 9
    assert make(shape_of(keys_and_values(4, 64))).state_rows == 0
    assert plan.memory[0]["gpu"]["work space"] >= 3 * 320 * 2**20


def test_a_layer_that_keeps_states_is_not_counted_as_one_that_attends():
    turn, machine = Round(64, 1000), Machine("cuda", 100 * GiB, 100 * GiB, 512 * GiB)
    plan = make(HYBRID, machine=machine, cache={"cpu": 100.0}, load=Workload(64, 400, 100))
    moved = costs.cache_nbytes(plan, HYBRID, 0, turn)["cpu"]
    token, state = 3 * 2 * 4 * 64 * 2, 6 * 2**20
    assert moved == {"load": 64 * (1000 * token + state), "store": 64 * (token + state)}
    assert HYBRID.attended(plan.ranges()) == 3 * 2 * 64
