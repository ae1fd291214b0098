"""noria plan --write: a run file that gives its plan again, to the byte, and what a run of it says."""

import json
import random
import re
import tomllib
from dataclasses import replace

import pytest

import small_run
from counts import count
from noria import config, kinds
from noria.__main__ import main
from noria.blocks import lay_out
from noria.encodings import capacity
from noria.errors import InputError
from noria.output.generations import open_generations
from noria.pieces import Encoded, Matrix
from noria.plan import building, planner, rates
from noria.plan.costs import Workload
from noria.plan.planner import GiB
from noria.plan.problem import Candidate, Machine, Problem
from noria.plan.written import otherwise, planned_config, run_file
from noria.tools.listed import blocks_in, listed
from test_costs import opt
from test_plan_coding import problem_of as coding_problem
from test_plan_states import HYBRID, RECURRENT
from test_plan_states import make as plan_with_states

SMALL = opt(13, 1024, 16)
H200 = rates.assumed("NVIDIA H200")
GPU = Machine("cuda", 13 * GiB // 10, 4 * GiB)


def problem_of(run, num_ranks, machine, rows):
    return Problem(run, *SMALL, "float16", num_ranks, machine, rows, Workload(rows * run.sampling.n, 300, 40))


CASES = [
    (1, Machine("cuda", 20 * GiB, GiB), 64, {}),
    (3, Machine("cuda", 20 * GiB, GiB), 64, {}),
    (1, GPU, 300, {}),
    (2, GPU, 300, {}),
    (3, GPU, 300, {"laps": 2}),
    (2, GPU, 300, {"weights": {"gpu": 30.0, "cpu": 70.0}, "cache": {"gpu": 20.0, "cpu": 80.0}}),
    (2, GPU, 300, {"weights": {"gpu": "200MiB", "cpu": "20GiB"}, "cache": {"gpu": "50MiB", "cpu": "1GiB"}}),
    (2, GPU, 300, {"weights": {"cpu": 50.0, "disk": 50.0}, "cache": {"cpu": 100.0}, "activations": "cpu"}),
    (2, GPU, 300, {"partition": "balanced", "n": 3}),
    (2, GPU, 300, {"partition": [5, 8], "schedule": "sequential", "step_tokens": 700, "microbatches": 3}),
    (2, GPU, 300, {"blocking": True, "cache": {"gpu": 60.0, "disk": 40.0}}),
    (1, Machine("cpu", 8 * GiB, 8 * GiB), 40, {"device": "cpu"}),
    (2, Machine("cpu", 8 * GiB, 8 * GiB), 40, {"device": "cpu", "weights": {"gpu": 50.0, "cpu": 50.0}}),
]


@pytest.mark.parametrize(("num_ranks", "machine", "rows", "flags"), CASES)
def test_a_written_run_file_plans_to_the_same_plan(tmp_path, num_ranks, machine, rows, flags):
    run = config.load(None, {"model": "m", "prompts": "p", "output": "o"} | flags)
    plan = planner.make(problem_of(run, num_ranks, machine, rows), H200)
    (tmp_path / "run.toml").write_text(run_file(run, plan))
    again = config.load(tmp_path / "run.toml")
    assert planner.make(problem_of(again, num_ranks, machine, rows), H200) == plan
    keys = [again.placement.weights, again.placement.cache, again.placement.activations, again.job.planned]
    for name in ("laps", "groups", "microbatches", "step_tokens", "microbatch_tokens", "partition", "schedule"):
        keys.append(getattr(again.pipeline, name))
    assert None not in keys and isinstance(again.pipeline.partition, list), "every planned key is set"
    assert again == planned_config(run, plan) and otherwise(again.job.planned, plan) == "plan: as noria plan wrote it"


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("total", [None, 300 * 22])
def test_a_cache_in_two_tiers_of_rows_that_were_all_looked_at_is_planned_again(num_ranks, total):
    run = config.load(None, {"model": "m", "prompts": "p", "output": "o", "groups": num_ranks + 1})
    load = Workload(300, 300, 40, total_pages=total, longest_pages=25, whole=True)
    for memory in (11, 12, 13, 14):
        problem = Problem(run, *SMALL, "float16", num_ranks, replace(GPU, memory_nbytes=memory * GiB // 10), 300, load)
        for part in (0.0, 0.3):
            candidate = Candidate(1, num_ranks + 1, 40, 256, rows=300, on_device=part)
            plan = building.build(problem, candidate)
            assert plan.of_pool("pages")["cpu"]
            plan = replace(plan, predicted=planner.make(problem, H200).predicted)
            written = replace(problem, config=planned_config(run, plan))
            assert planner.make(written, H200).of_pool("pages") == plan.of_pool("pages")


@pytest.mark.parametrize("shape", [HYBRID, RECURRENT], ids=["hybrid", "recurrent"])
@pytest.mark.parametrize("cache", [None, {"cpu": 100.0}, {"gpu": 30.0, "cpu": 70.0}])
def test_states_are_planned_again_too(tmp_path, shape, cache):
    for load in (Workload(5000, 400, 100), Workload(7, 433, 31, total_pages=230, longest_pages=31)):
        flags = {"model": "m", "prompts": "p", "output": "o", "cache": cache}
        plan = plan_with_states(shape, 2, load=load, **({"cache": cache} if cache else {}))
        run = planned_config(config.load(None, {name: value for name, value in flags.items() if value}), plan)
        (tmp_path / "run.toml").write_text(run.to_toml())
        tree = tomllib.loads((tmp_path / "run.toml").read_text())
        keys = {name: value for section in ("pipeline", "placement") for name, value in tree[section].items()}
        assert plan_with_states(shape, 2, load=load, **keys) == plan


@pytest.mark.parametrize("flags", [
    {"weights": {"cpu": 100.0}}, {"weights": {"cpu": 100.0}, "compress_weights": "off"}, {"memory": 12 * GiB}, {"memory": 60 * GiB},
])  # fmt: skip
def test_weights_that_are_coded_while_they_load_are_planned_so_again(flags):
    problem = coding_problem(**flags)
    plan = planner.make(problem, H200)
    assert plan.coded == ("weights" in flags and "compress_weights" not in flags) or "memory" in flags
    assert planner.make(replace(problem, config=planned_config(problem.config, plan)), H200) == plan


def in_fp8(block):
    """The plain block with its matrices in FP8."""
    settings = kinds.load("encodings", "fp8_block").DEFAULTS
    forms = {
        one.name: Encoded("fp8_block", settings, capacity("fp8_block", [Matrix("", one.shape)], one.dtype, settings))
        for one in block.parameters
        if len(one.shape) > 1
    }
    return lay_out(block.name, {one.name: one.wanted for one in block.parameters}, block.parameters[0].dtype, forms)


@pytest.mark.parametrize(
    "flags", [{}, {"weights": {"gpu": "100MiB", "cpu": "20GiB"}}, {"weights": {"gpu": 50.0, "cpu": 50.0}}]
)
def test_encoded_weights_are_decoded_at_the_same_time_again(flags):
    shape, blocks = SMALL
    encoded = {name: in_fp8(block) if name.startswith("layers/") else block for name, block in blocks.items()}
    run = config.load(None, {"model": "m", "prompts": "p", "output": "o"} | flags)
    for memory in (8 * GiB, 1.45 * GiB):
        problem = Problem(
            run, shape, encoded, "float16", 1, Machine("cuda", int(memory), 8 * GiB), 64, Workload(64, 300, 40)
        )
        plan = planner.make(problem, H200)
        assert plan.decoded or flags or memory < 8 * GiB, "where there is room"
        assert planner.make(replace(problem, config=planned_config(run, plan)), H200) == plan


@pytest.mark.slow
def test_random_plans_are_written_and_planned_again():
    draw = random.Random(17)
    tried = 0
    while tried < count(200):
        ranks, rows = draw.choice([1, 2, 3, 4, 6]), draw.choice([3, 40, 500])
        device, host = draw.choice([1.0, 1.3, 2, 8]), draw.choice([0.3, 2, 16])
        flags = {
            "laps": draw.choice([None, None, 1, 2]),
            "groups": draw.choice([None, None, ranks, ranks + 1]),
            "step_tokens": draw.choice([None, 300, 1000, 4096]),
            "weights": draw.choice([None, None, {"gpu": 37.0, "cpu": 63.0}, {"cpu": 80.0, "disk": 20.0}]),
            "cache": draw.choice([None, None, {"gpu": 41.0, "cpu": 59.0}, {"gpu": 70.0, "disk": 30.0}]),
            "activations": draw.choice([None, "cpu"]),
            "n": draw.choice([1, 3]),
        }
        flags = {name: value for name, value in flags.items() if value is not None}
        run = config.load(None, {"model": "m", "prompts": "p", "output": "o"} | flags)
        problem = problem_of(run, ranks, Machine("cuda", int(device * GiB), int(host * GiB)), rows)
        try:
            plan = planner.make(problem, H200)
        except InputError:
            continue
        tried += 1
        assert planner.make(replace(problem, config=planned_config(run, plan)), H200) == plan, flags


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_run.write_files(tmp_path_factory.mktemp("written"))


@pytest.mark.slow
def test_a_plan_is_written_once_and_a_run_of_it_has_that_plan(folder, capsys, tmp_path):
    path, flags = tmp_path / "run2.toml", ["--weights", "gpu=50,cpu=50", "--laps", "1"]
    command = ["plan", "--ranks", "1", "--write", str(path), *small_run.command(folder, "out.h5", *flags)[1:]]
    assert main([*command, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (
        main(command) == 2 and f"--write {path}: the file exists: remove it, or name another" in capsys.readouterr().err
    )
    assert main(["plan", "--ranks", "1", "--json", str(path)]) == 0
    again = json.loads(capsys.readouterr().out)
    assert (
        again["plan"] == told["plan"] and again["predicted"] == told["predicted"] and again["memory"] == told["memory"]
    )
    assert main(["run", str(path), "--cpu-memory", "1GiB"]) == 0
    said = capsys.readouterr().err
    assert "plan: as noria plan wrote it" in said
    with open_generations(folder / "out.h5") as file:
        stored = json.loads(file.attrs["plan"])
        assert all(row.status == "done" for row in file.rows())
    assert stored["weight_tiers"] == told["plan"]["weight_tiers"] and stored["pools"] == told["plan"]["pools"]


def test_a_plan_that_cannot_be_written_is_refused(folder, capsys, tmp_path):
    command = ["plan", "--ranks", "1", *small_run.command(folder, "out.h5")[1:]]
    assert main([*command, "--write", str(tmp_path / "no" / "run.toml")]) == 2
    assert "no/run.toml: No such file or directory" in capsys.readouterr().err


def test_a_run_says_where_its_plan_is_another():
    run = config.load(None, {"model": "m", "prompts": "p", "output": "o"})
    plan = planner.make(problem_of(run, 2, GPU, 300), H200)
    planned = planned_config(run, plan).job.planned
    said = otherwise(planned | {"ranks": 4, "tokens_per_second": planned["tokens_per_second"] * 2}, plan)
    assert said.startswith("plan: not as noria plan wrote it: ranks 2 (4 planned), tokens per second ")
    assert otherwise(planned | {"tokens_per_second": planned["tokens_per_second"] * 1.005}, plan).endswith("wrote it")
    former = {name: value for name, value in planned.items() if name in ("ranks", "gpu_pages", "tokens_per_second")}
    said = otherwise(former | {"gpu_pages": former["gpu_pages"] + 1}, replace(plan, weight_slots=3))
    assert "gpu pages" in said and "weight slots 3 (0 planned)" in said, "the former version left zeros out"


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"step_tokens": 4096}, "step tokens 4,096 (8,192 planned)"),
        ({"microbatch_tokens": 512}, "microbatch tokens 512 (4,096 planned)"),
        ({"laps": 2, "partition": "greedy"}, "laps 2 (1 planned), partition 4,3,3,3 (7,6 planned)"),
        ({"partition": [6, 7]}, "partition 6,7 (7,6 planned)"),
        ({"schedule": "sequential"}, "schedule sequential (single_batch planned)"),
        ({"activations": "cpu"}, "activations cpu (gpu planned)"),
        (
            {"weights": {"gpu": 50.0, "cpu": 50.0}},
            "gpu blocks 9 (15 planned), cpu blocks 6 (0 planned), weight slots 3",
        ),
    ],
)
def test_a_run_names_each_choice_that_its_flags_have_changed(keys, said):
    """However near the speed is."""
    chosen = {"step_tokens": 8192, "microbatch_tokens": 4096, "partition": [7, 6]}
    machine, run = (
        Machine("cuda", 20 * GiB, 4 * GiB),
        config.load(None, {"model": "m", "prompts": "p", "output": "o"} | chosen),
    )
    whole = planned_config(run, planner.make(problem_of(run, 2, machine, 300), H200))
    pipeline = {name: keys[name] for name in keys if hasattr(whole.pipeline, name)}
    placement = {name: keys[name] for name in keys if hasattr(whole.placement, name)}
    changed = replace(
        whole, pipeline=replace(whole.pipeline, **pipeline), placement=replace(whole.placement, **placement)
    )
    plan = planner.make(problem_of(changed, 2, machine, 300), H200)
    fast = whole.job.planned | {"tokens_per_second": plan.predicted["tokens_per_second"]}
    assert otherwise(fast, plan).startswith("plan: not as noria plan wrote it: ") and said in otherwise(fast, plan)


def test_a_run_file_for_other_ranks_says_for_how_many_it_is():
    run = config.load(None, {"model": "m", "prompts": "p", "output": "o"})
    whole = planned_config(run, planner.make(problem_of(run, 2, GPU, 300), H200))
    said = "it was planned for 2 ranks (job.planned): start so many, or write another with noria plan --ranks 3"
    with pytest.raises(InputError, match=re.escape(said)):
        planner.make(problem_of(whole, 3, GPU, 300), H200)


LISTS = [
    ({"gpu": "layers 0-12 head"}, "lists blocks, but not embed: list each block of the model once"),
    ({"gpu": "embed layers 0-11 head"}, "lists blocks, but not layers 12: "),
    ({"gpu": "embed layers 0-15 head"}, "lists layers 13-15, but the model has 13 layers, 0 to 12"),
    ({"gpu": "embed layers 0-6 head", "cpu": "layers 6-12"}, "lists layers/0006 under gpu and cpu"),
    ({"gpu": "embed layers 0-6 3 head", "cpu": "layers 7-12"}, "weights.gpu lists layers/0003 twice"),
    ({"gpu": "embed layers 0-6 head", "cpu": "20GiB"}, "lists blocks in one tier and not in another"),
    ({"gpu": "layers 0-12 head", "disk": "embed"}, "lists embed under disk"),
    ({"gpu": "layers 0-x head"}, "has '0-x': list blocks as in"),
    ({"gpu": "layers 9-2 head"}, "has '9-2'"),
    ({"gpu": "layers 0-99999999999"}, "has '0-99999999999'"),
]


@pytest.mark.parametrize(("weights", "said"), LISTS)
def test_a_list_of_blocks_that_does_not_fit_the_model_is_refused(weights, said):
    with pytest.raises(InputError, match=re.escape(said)):
        run = config.load(None, {"model": "m", "prompts": "p", "output": "o", "weights": weights})
        planner.make(problem_of(run, 2, GPU, 300), H200)


def test_a_list_of_blocks_is_read_as_it_was_written():
    names = ["embed", "layers/0000", "layers/0002", "layers/0003", "layers/0004", "layers/0011", "head"]
    text = listed(reversed(names))
    assert text == "layers 0 2-4 11 embed head" and sorted(blocks_in(text, "key")) == sorted(names)


WRONG = [
    ({"planned": {"rank": 2}}, "unknown name 'rank' in job.planned; did you mean 'ranks'?"),
    ({"planned": {"ranks": "two"}}, "job.planned.ranks is 'two': it must be a number"),
    ({"planned": {"ranks": 10**5000}}, "job.planned.ranks is 9,223,372,036,854,775,808 or more: it must be a number"),
    ({"planned": {"partition": [6, "7"]}}, "job.planned.partition is \"[6, '7']\": it must be a list of numbers"),
    (
        {"partition": [12, 12]},
        "pipeline.partition has 2 numbers with sum 24: it needs 2 (ranks x laps) with sum 13 (layers)",
    ),
    ({"partition": [4, 4, 5]}, "it needs 2 (ranks x laps) with sum 13"),
    ({"laps": 9}, "18 virtual stages (ranks x laps) for 13 layers: use at most 13 ranks x laps"),
    ({"laps": 2, "partition": [6, 7]}, "it needs 4 (ranks x laps)"),
    ({"step_tokens": 100, "microbatch_tokens": 200}, "microbatch_tokens is 200, more than pipeline.step_tokens (100)"),
    ({"weights": {"gpu": "1MiB"}}, "placement.weights is too small: "),
    ({"weights": {"gpu": 100.0}, "gpu_memory": "300MiB"}, "gpu tier needs "),
    ({"weights": {"cpu": 100.0}, "cpu_memory": "10MiB"}, "cpu tier needs "),
    ({"cache": {"gpu": "9GiB"}}, "placement.cache.gpu (9GiB)"),
    ({"cache": {"cpu": "90GiB"}}, "placement.cache.cpu (90GiB)"),
    ({"cache": {"gpu": "999999 pages"}}, "placement.cache.gpu (999999 pages)"),
    ({"cache": {"gpu": "ten pages"}}, "placement.cache.gpu is 'ten pages': it must be a size such as 16GiB"),
    ({"weights": {"gpu": "10 pages"}}, "placement.weights.gpu is '10 pages': it must be a size"),
    ({"cache": {"gpu": "1KiB"}}, "placement.cache holds no page: a page takes "),
    ({"blocking": True, "groups": 5}, "5 groups on 2 ranks deadlocks"),
    ({"gpu_memory": "80GiB"}, "gpu_memory is 80.0 GiB, but the rank with the least has 1.3 GiB"),
]


@pytest.mark.parametrize(("keys", "said"), WRONG)
def test_planned_keys_that_do_not_fit_are_refused_with_the_numbers(keys, said):
    with pytest.raises(InputError, match=re.escape(said)):
        run = config.load(None, {"model": "m", "prompts": "p", "output": "o"} | keys)
        planner.make(problem_of(run, 2, GPU, 30_000), H200)
