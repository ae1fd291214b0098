"""What a CPU takes beside what was measured of it: models of 1,024 and of 64 wide on one thread of an EPYC, with the rates of
its own probe. Seconds are the process's own, so that what others did on the machine does not count."""

from dataclasses import replace

import pytest

from noria import config
from noria.blocks import lay_out, layer_name
from noria.model import ModelShape
from noria.plan import costs, planner, rates
from noria.plan.costs import Round, Workload
from noria.plan.planner import GiB
from noria.plan.problem import Machine, Problem

CORE = rates.parse("""
device = "CPU"
host_to_device = 1.097e10
device_to_host = 1.097e10
both_directions = 5.487e9
device_memory = 1.627e10
host_memory = 1.627e10
layer_seconds = 5.306e-5
[matmul_rows.float32]
1 = 8.135e9
4 = 1.834e10
16 = 4.777e10
64 = 7.678e10
256 = 8.815e10
""")


def llama(layers, hidden, heads, kv_heads, inner, vocab):
    """Shape and bfloat16 blocks of a Llama whose heads have hidden / heads numbers."""
    dim = hidden // heads
    shape = ModelShape("llama", layers, hidden, heads, kv_heads, dim, vocab, 8192, False)
    layer = {"qkv": ((heads + 2 * kv_heads) * dim, hidden), "out": (hidden, hidden), "gate_up": (2 * inner, hidden)}
    layer["down"] = (hidden, inner)
    names = {"embed": {"tokens": (vocab, hidden)}, "head": {"lm_head": (vocab, hidden)}}
    names |= {layer_name(number): layer for number in range(layers)}
    return shape, {name: lay_out(name, shapes, "float32") for name, shapes in names.items()}


SMALL, TINY = llama(8, 1024, 16, 8, 2816, 16000), llama(16, 64, 2, 1, 128, 500)


def plan_of(made, load, known=CORE, **flags):
    run = config.load(None, {"model": "m", "prompts": "p", "output": "o", "device": "cpu"} | flags)
    machine = Machine("cpu", 16 * GiB)
    return planner.make(Problem(run, *made, "float32", 1, machine, load.num_rows, load), known)


@pytest.mark.parametrize(
    ("made", "load", "phase", "speed"),
    [
        (SMALL, Workload(1, 64, 128), "prefill", 346.1),
        (SMALL, Workload(1, 64, 128), "decode", 31.5),
        (SMALL, Workload(16, 64, 64), "prefill", 416.3),
        (SMALL, Workload(16, 64, 64), "decode", 164.7),
        (TINY, Workload(1, 32, 200), "decode", 203.3),
        (TINY, Workload(256, 32, 40), "prefill", 13783),
        (TINY, Workload(256, 32, 40), "decode", 6867),
        (TINY, Workload(16, 1024, 16), "prefill", 9196),
    ],
)
def test_a_phase_is_as_fast_as_it_was(made, load, phase, speed):
    assert plan_of(made, load).predicted[phase]["tokens_per_second"] == pytest.approx(speed, rel=0.15)


def test_all_that_a_cpu_does_adds_up():
    plan = plan_of(SMALL, Workload(16, 64, 64))
    terms, found = plan.predicted["terms"]["decode"], plan.predicted["decode"]["round_seconds"]
    whole = sum(terms.values()) - min(terms["matmul"], terms["device memory"])
    assert found == pytest.approx(whole, rel=0.01)
    slow = plan_of(SMALL, Workload(16, 64, 64), replace(CORE, layer_seconds=1e-3))
    assert slow.predicted["decode"]["round_seconds"] > found + 8 * 3e-3


@pytest.mark.parametrize("made", [SMALL, TINY], ids=["small", "tiny"])
def test_a_cpu_is_no_faster_where_copies_hide_behind_nothing(made):
    load = Workload(16, 64, 64)
    speeds = [
        plan_of(made, load, schedule=how).predicted["tokens_per_second"] for how in ("single_batch", "sequential")
    ]
    assert speeds[0] == pytest.approx(speeds[1], rel=1e-6), "nothing is copied"


def test_rows_of_several_lengths_are_attended_one_length_after_another():
    plan = plan_of(TINY, Workload(64, 32, 40))
    one, many = (costs.calls_of(plan, Round(64, 50, lengths=lengths)) for lengths in (1, 64))
    assert (one, many) == (1, 64)
