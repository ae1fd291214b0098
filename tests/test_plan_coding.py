"""Plans whose streamed weights are coded without loss while they load: where they gain by it, and what they count."""

from dataclasses import replace

import pytest

from noria import config
from noria.blocks import lay_out, layer_name
from noria.model import ModelShape
from noria.plan import building, costs, planner, rates
from noria.plan.costs import Workload
from noria.plan.planner import GiB
from noria.plan.problem import Candidate, Machine, Problem

SHAPE = ModelShape("llama", 8, 4096, 32, 8, 128, 32000, 2048, False)
LAYER = {
    "small": (64, 64),
    "qkv": (6144, 4096),
    "out": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
    "norm": (4096,),
}
ENDS = {"embed": {"tokens": (32000, 4096)}, "head": {"norm": (4096,), "lm_head": (32000, 4096)}}
CPU = {"weights": {"cpu": 100.0}}


def problem_of(dtype="bfloat16", stored=None, device="cuda", memory=20 * GiB, **flags):
    names = {layer_name(number): LAYER for number in range(SHAPE.num_layers)}
    blocks = {name: lay_out(name, shapes, stored or dtype) for name, shapes in (ENDS | names).items()}
    run = config.load(None, {"model": "m", "prompts": "p", "output": "o"} | flags)
    return Problem(run, SHAPE, blocks, dtype, 1, Machine(device, memory, 100 * GiB), 64, Workload(64, 64, 64))


def make(**flags):
    return planner.make(problem_of(**flags), rates.assumed("cuda"))


def test_streamed_weights_are_coded_where_the_link_binds():
    plan, plain = make(**CPU), make(compress_weights="off", **CPU)
    assert plan.coded and not plain.coded
    terms, others = (its.predicted["terms"]["decode"] for its in (plan, plain))
    assert terms["link"] / others["link"] == pytest.approx(11.4 / 16, abs=0.01)
    assert others["decoding"] == 0 < terms["decoding"] < 0.1 * terms["link"]
    assert plan.predicted["tokens_per_second"] > 1.3 * plain.predicted["tokens_per_second"]
    assert "coded without loss while they load (--compress-weights off: not)" in "\n".join(plan.lines())
    assert "coded" not in "\n".join(plain.lines())


def test_the_plan_says_where_it_could_code_what_streams_and_does_not():
    said = "stay as they are: coded without loss they would come no faster"
    for coded in (True, False):
        plan = building.build(problem_of(**CPU), Candidate(1, 1, 1, 4096, 64, 1.0, "gpu", coded=coded))
        assert (said in "\n".join(plan.lines())) != plan.coded == coded
    others = [make(memory=60 * GiB), make(compress_weights="off", **CPU), make(weights={"disk": 100.0})]
    assert not any(said in "\n".join(plan.lines()) for plan in others)


@pytest.mark.parametrize(
    "flags",
    [
        {"dtype": "float16", **CPU},
        {"dtype": "float32", **CPU},
        {"stored": "float32", **CPU},  # cast while they load
        {"memory": 60 * GiB},  # nothing streams
        {"weights": {"disk": 100.0}},  # as the file has it
        {"compress_weights": "off", **CPU},
    ],
)
def test_other_weights_are_not(flags):
    assert not make(**flags).coded


def test_what_is_copied_to_scratch_is_coded_where_that_gains():
    disk = {"weights": {"disk": 100.0}, "stage": True}
    plan, plain = make(**disk), make(compress_weights="off", **disk)
    assert plan.coded and plan.coded_tiers == ("cpu", "disk") and not plain.coded
    assert make(**CPU).coded_tiers == ("cpu",)
    terms, others = (its.predicted["terms"]["decode"] for its in (plan, plain))
    assert terms["disk"] / others["disk"] == pytest.approx(11.4 / 16, abs=0.01)
    assert plan.predicted["tokens_per_second"] > 1.3 * plain.predicted["tokens_per_second"]
    assert "CPU memory and scratch are coded without loss" in "\n".join(plan.lines())


def test_never_on_the_cpu_itself():
    problem = problem_of(device="cpu", memory=100 * GiB, **CPU)
    assert not problem.may_code and not planner.make(problem, rates.assumed("cpu")).coded
    assert problem_of(**CPU).may_code and not problem_of(stored="float32", **CPU).may_code


def test_the_plan_counts_what_they_are_decoded_into_and_buffers_that_they_pass():
    problem = problem_of(cache={"gpu": 100.0}, **CPU)
    plain, coded = (building.build(problem, Candidate(1, 1, 4, 2048, 64, coded=its)) for its in (False, True))
    layer, block = lay_out("l", LAYER, "bfloat16"), problem.blocks["layers/0000"]
    gpu, other = (plan.memory[0]["gpu"] for plan in (coded, plain))
    assert gpu["decoded weights"] == block.coded.decoding_room(coded.decoding_room) and "decoded weights" not in other
    assert gpu["weight slots"] == other["weight slots"] == 3 * layer.nbytes  # one that does not fit stays plain
    cpu = coded.memory[0]["cpu"]
    assert cpu["weights"] == plain.memory[0]["cpu"]["weights"] and cpu["loading"] >= 2 * layer.nbytes - GiB
    assert plain.memory[0]["cpu"].get("loading", 0) < cpu["loading"]


def test_a_plan_where_the_link_does_not_bind_stays_plain():
    problem, fast = (
        problem_of(**CPU),
        replace(rates.assumed("cuda"), host_to_device=1e15, device_to_host=1e15, both_directions=1e15),
    )
    plan = planner.make(problem, fast)
    assert not plan.coded
    coded = costs.predict(replace(plan, coded=True), problem.cut(plan.laps), fast, problem.workload)
    assert coded["tokens_per_second"] <= plan.predicted["tokens_per_second"]


def test_small_parameters_are_left_plain():
    block = problem_of().blocks["layers/0000"]
    assert [one.name for one in block.coded.encoded] == ["qkv", "out", "gate_up", "down"]
    assert block.coded.nbytes / block.nbytes == pytest.approx(11.4 / 16, abs=0.01)
    assert block.coded.decoded_nbytes == pytest.approx(block.nbytes, rel=0.01)
