"""A head that is larger than layers: where weights stream, it stays on the device, so that no buffer is as large as it is."""

from dataclasses import replace

from noria import config
from noria.plan import costs, planner, rates
from noria.plan.costs import Workload
from noria.plan.planner import GiB
from noria.plan.problem import Machine, Problem
from test_costs import llama

WIDE = llama(32, 4096, 32, 8, 14336, 128256)  # a head of 1 GiB, layers of 0.4


def plan_of(made, num_ranks=1):
    run = config.load(None, {"model": "m", "prompts": "p", "output": "o", "compress_weights": "off"})
    machine = Machine("cuda", 16 * GiB // num_ranks, 64 * GiB)
    return planner.make(Problem(run, *made, "bfloat16", num_ranks, machine, 500, Workload(500, 512, 64)), rates.Rates())


def test_a_large_head_stays_on_the_device_and_buffers_are_as_large_as_layers():
    plan, layer = plan_of(WIDE), WIDE[1]["layers/0000"].nbytes
    assert plan.weight_slots and plan.weight_tiers[0]["head"] == "gpu"
    assert plan.memory[0]["gpu"]["weight slots"] == plan.weight_slots * layer < WIDE[1]["head"].nbytes * 2
    assert sum(plan.memory[0]["gpu"].values()) <= 16 * GiB


def test_each_group_has_an_equal_share_of_the_pages_of_a_tier():
    plan = replace(
        plan_of(WIDE), groups=4, pools={"gpu": {"pages": 150, "states": 0}, "cpu": {"pages": 79, "states": 0}}
    )
    load = Workload(500, 512, 64)  # 36 pages a row
    assert costs.rows_in_flight(plan, load) == 4 * (150 // 4 // 36) + 4 * (79 // 4 // 36) == 4
