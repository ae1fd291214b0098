import dataclasses
import re

import pytest

from noria import config
from noria.blocks import lay_out, layer_name
from noria.errors import InputError
from noria.model import ModelShape
from noria.plan import planner
from noria.plan.costs import Workload
from noria.plan.planner import GiB
from noria.plan.problem import Machine, Problem

SHAPE = ModelShape("llama", 8, 1024, 16, 4, 64, 32000, 2048, False)

ENDS = {"embed": {"tokens": (32000, 1024)}, "head": {"norm": (1024,), "lm_head": (32000, 1024)}}


def blocks(dtype="bfloat16"):
    layer = {"qkv": (1536, 1024), "out": (1024, 1024), "gate_up": (8192, 1024), "down": (1024, 4096)}
    names = {layer_name(number): layer for number in range(SHAPE.num_layers)}
    return {name: lay_out(name, shapes, dtype) for name, shapes in (ENDS | names).items()}


def make(num_ranks=1, machine=Machine("cuda", 20 * GiB), rows=10_000, dtype="bfloat16", **flags):
    flags = {"model": "m", "prompts": "p", "output": "o"} | flags
    run = config.load(None, {name: value for name, value in flags.items() if value is not None})
    return planner.make(Problem(run, SHAPE, blocks(), dtype, num_ranks, machine, rows))


def test_the_plan_fills_the_memory_it_was_given_and_no_more():
    for num_ranks in (1, 2, 3):
        plan = make(num_ranks, cache={"gpu": 100.0})
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


def test_samples_that_rows_ask_for_themselves_get_pages_too():
    """10 prompts of 16 samples, whether the run says so or each row."""
    load = Workload(160, 12, 32, total_pages=640, longest_pages=4, whole=True)
    run = {"model": "m", "prompts": "p", "output": "o"}
    for flags in ({"n": 16}, {}):
        of_work = SHAPE, blocks(), "bfloat16", 2, Machine("cuda", 20 * GiB), 10, load
        assert planner.make(Problem(config.load(None, run | flags), *of_work)).predicted["rows"] == 160


@pytest.mark.parametrize("groups", [3, 5, 6, 7])
def test_groups_that_do_not_divide_the_rows_leave_none_of_them_to_a_second_wave(groups):
    load = Workload(16, 60, 100, total_pages=16 * 12, longest_pages=12, whole=True)
    run = config.load(None, {"model": "m", "prompts": "p", "output": "o", "groups": groups})
    plan = planner.make(Problem(run, SHAPE, blocks(), "bfloat16", 2, Machine("cuda", 20 * GiB), 16, load))
    assert plan.predicted["rows"] == 16 and plan.predicted["rounds"]["decode"] == 99


def test_rows_that_all_find_room_are_all_in_flight_though_the_mean_row_is_rounded_up_to_whole_pages():
    """64 rows of 4 to 12 pages, 7.4 on average, as a run of 9 groups had them in 31 decode rounds."""
    load = Workload(64, 60.3, 32, total_pages=472, longest_pages=12, whole=True)
    run = config.load(None, {"model": "m", "prompts": "p", "output": "o", "groups": 9})
    plan = planner.make(Problem(run, SHAPE, blocks(), "bfloat16", 2, Machine("cuda", 20 * GiB), 64, load))
    assert plan.num_pages == 472 + 9 * 8 and plan.predicted["rounds"]["decode"] == 31


@pytest.mark.parametrize(
    ("num_ranks", "device", "flags", "groups"),
    [
        (1, "cpu", {}, 1),
        (1, "cuda", {}, 1),
        (3, "cuda", {"blocking": True}, 3),
        (3, "cpu", {}, 4),
        (2, "cpu", {"groups": 7}, 7),
    ],
)
def test_groups_keep_the_ring_full_unless_they_are_asked_for(num_ranks, device, flags, groups):
    assert make(num_ranks, Machine(device, 20 * GiB), **flags).groups == groups


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_the_ring_is_never_left_without_a_group_a_rank(num_ranks):
    assert make(num_ranks, Machine("cuda", 20 * GiB)).groups >= num_ranks


def test_memory_that_does_not_suffice_is_refused_with_the_numbers_and_the_remedy():
    with pytest.raises(
        InputError,
        match=r"gpu tier needs \d+\.\d MiB, the limit is 100\.0 MiB: use more ranks.*rank 0 .*work space \d+\.\d MiB",
    ):
        make(gpu_memory="100MiB")


def test_a_limit_above_what_the_device_has_is_refused():
    with pytest.raises(InputError, match=r"gpu_memory is 30\.0 GiB, but the rank with the least has 20\.0 GiB"):
        make(gpu_memory="30GiB")


@pytest.mark.parametrize(
    ("num_ranks", "flags", "said"),
    [
        (3, {"laps": 3}, "9 virtual stages .* for 8 layers: use at most 8"),
        (2, {"blocking": True, "groups": 3}, "3 groups on 2 ranks deadlocks"),
        (1, {"blocking": True}, "1 group on 1 rank deadlocks"),
        (1, {"step_tokens": 8, "microbatch_tokens": 9}, "microbatch_tokens is 9, more than pipeline.step_tokens"),
        (2, {"partition": [5, 2]}, "has 2 numbers with sum 7"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(num_ranks, flags, said):
    with pytest.raises(InputError, match=said):
        make(num_ranks, **flags)


def test_a_plan_prints_every_rank_with_its_layers():
    lines = make(2, laps=2).lines()
    assert len(lines) == 6 and "layers 0-1, 4-5" in lines[1] and "layers 2-3, 6-7" in lines[3]
    assert re.fullmatch(r"plan: rank 0: cpu .*: loading .*", lines[2])


def test_the_buffers_of_loading_count_until_the_cache_takes_their_place():
    largest = 2 * max(block.nbytes for block in blocks().values())
    for flags, expected in (
        ({"cache": {"gpu": 100.0}}, largest),
        ({"cache": {"gpu": 100.0}, "dtype": "float32"}, largest),  # blocks are read as they are stored
        ({"weights": {"cpu": 100}, "compress_weights": "off"}, 0),
        ({"weights": {"cpu": 100}, "dtype": "float32"}, largest),
        ({"weights": {"disk": 100}, "stage": True}, largest - 2**28),  # less the slots of the disk tier
        ({"cache": {"cpu": 100}}, 0),
    ):
        plan = make(1, BIG, **flags)
        assert plan.memory[0]["cpu"].get("loading", 0) == max(expected, 0), flags
    on_cpu = Machine("cpu", 20 * GiB)
    assert "loading" not in make(1, on_cpu).memory[0]["cpu"]
    assert make(1, on_cpu, dtype="float32").memory[0]["cpu"]["loading"] == largest


def test_host_memory_that_holds_no_buffer_of_loading_is_refused():
    with pytest.raises(
        InputError, match=r"cpu tier needs 125\.0 MiB, the limit is 60\.0 MiB: raise placement\.cpu_memory"
    ):
        make(1, Machine("cuda", 20 * GiB, 60 * 2**20))


def test_a_plan_is_plain_data():
    plan = make(2)
    assert planner.Plan(**{f.name: plan.as_dict()[f.name] for f in dataclasses.fields(plan)}) == plan


BIG = Machine("cuda", 20 * GiB, 64 * GiB, 512 * GiB)


def refusal(num_ranks=1, machine=BIG, **keys):
    with pytest.raises(InputError) as caught:
        make(num_ranks, machine, **keys)
    return str(caught.value)


@pytest.mark.parametrize("share", [0.0, 10.0, 20.0, 50.0, 75.0, 100.0])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_each_rank_gets_the_share_that_was_asked_for_to_within_a_block(share, num_ranks):
    plan = make(num_ranks, BIG, weights={"gpu": share, "cpu": 100 - share})
    for held in plan.weight_tiers:
        moved = {name: tier for name, tier in held.items() if name != "embed"}
        sizes = {name: blocks()[name].nbytes for name in moved}
        resident = sum(sizes[name] for name, tier in moved.items() if tier == "gpu")
        assert abs(resident - share / 100 * sum(sizes.values())) <= max(sizes.values())


def test_all_blocks_of_the_model_have_a_tier_on_exactly_one_rank():
    plan = make(3, BIG, laps=2, weights={"gpu": 30.0, "cpu": 70.0})
    assert sorted(name for held in plan.weight_tiers for name in held) == sorted(blocks())


def test_the_embedding_is_on_the_gpu_if_any_weights_are():
    assert make(1, BIG, weights={"gpu": 10.0, "cpu": 90.0}).weight_tiers[0]["embed"] == "gpu"
    assert make(1, BIG, weights={"cpu": 100.0}).weight_tiers[0]["embed"] == "cpu"


def test_budgets_of_weights_hold_for_every_rank():
    plan = make(2, BIG, weights={"gpu": "60MiB", "cpu": "100MiB", "disk": "1TiB"})
    for memory in plan.memory:
        assert 0 < memory["gpu"]["weights"] <= 60 * 1024**2 and memory["cpu"]["weights"] <= 100 * 1024**2


@pytest.mark.parametrize(
    ("cache", "flags", "schedule"),
    [
        ({"gpu": 100.0}, {}, "single_batch"),
        ({"cpu": 100.0}, {}, "multi_batch"),
        ({"gpu": 100.0}, {"activations": "cpu"}, "multi_batch"),
        ({"cpu": 100.0}, {"schedule": "sequential"}, "sequential"),
    ],
)
def test_microbatches_overlap_where_the_cache_or_activations_are_not_on_the_gpu(cache, flags, schedule):
    plan = make(1, BIG, cache=cache, weights={"gpu": 50.0, "cpu": 50.0}, **flags)
    slots = 1 if schedule == "sequential" else 3
    assert plan.schedule == schedule and plan.weight_slots == slots
    assert plan.cache_slots == (slots if "cpu" in cache else 0)


def test_nothing_that_streams_needs_no_slots():
    plan = make(1, BIG, weights={"gpu": 100.0})
    assert (plan.weight_slots, plan.cache_slots, plan.cache_slot_pages) == (0, 0, 0)


def test_the_cache_has_its_shares_of_pages_and_fits_each_tier():
    plan = make(2, BIG, cache={"gpu": 20.0, "cpu": 70.0, "disk": 10.0})
    pages = plan.of_pool("pages")
    assert sum(pages.values()) == plan.num_pages
    assert pages["gpu"] == pytest.approx(0.2 * plan.num_pages, abs=2)
    assert pages["cpu"] == pytest.approx(0.7 * plan.num_pages, abs=2)
    for memory in plan.memory:
        assert sum(memory["gpu"].values()) <= 20 * GiB and sum(memory["cpu"].values()) <= 64 * GiB


def test_a_staging_buffer_holds_the_longest_sequence_and_three_of_them_a_sixteenth_of_the_device():
    plan = make(1, BIG, cache={"cpu": 100.0})
    assert plan.cache_slot_pages >= 2048 // 16
    assert plan.memory[0]["gpu"]["cache slots"] <= 20 * GiB / 16
    assert make(1, BIG, cache={"cpu": 100.0}, rows=1).cache_slot_pages == 2048 // 16


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"weights": {"cpu": 100.0}, "cpu_memory": "100MiB"},
         "cpu tier needs 357.0 MiB, the limit is 100.0 MiB: lower placement.weights.cpu (100) or raise placement.cpu_memory"),
        ({"weights": {"gpu": "40MiB", "cpu": "40MiB"}}, "placement.weights is too small: "),
        ({"cache": {"cpu": "80GiB"}}, "cpu tier needs 80.0 GiB, the limit is 64.0 GiB: lower placement.cache.cpu (80GiB)"),
        ({"cpu_memory": "80GiB"}, "placement.cpu_memory is 80.0 GiB, but the rank with the least has 64.0 GiB"),
        ({"weights": {"disk": 100.0}, "dtype": "float32"}, 'set dtype = "bfloat16"'),
        ({"weights": {"disk": 100.0}, "model": None, "random_weights": "c.json"}, "set placement.stage = true"),
        ({"stage": True, "weights": {"gpu": 100.0}}, "placement.stage is true, but no weights are on disk"),
        ({"cache": {"disk": "90GiB"}, "machine": Machine("cuda", 20 * GiB, 64 * GiB, 80 * GiB)},
         "disk tier needs 90.0 GiB, the limit is 80.0 GiB: lower placement.cache.disk (90GiB) or make room"),
    ],
)  # fmt: skip
def test_a_placement_that_cannot_be_honoured_is_refused_with_the_numbers_and_the_remedy(keys, said):
    assert said in refusal(**keys)


def test_weights_on_disk_that_are_staged_may_be_random():
    keys = {"weights": {"disk": 100.0}, "model": None, "random_weights": "c.json", "stage": True}
    assert make(1, BIG, **keys).memory[0]["disk"]["weights"] > 0


def test_a_cpu_has_one_memory_for_both_tiers():
    plan = make(
        1, Machine("cpu", 2 * GiB, 2 * GiB), weights={"gpu": 50.0, "cpu": 50.0}, cache={"gpu": 50.0, "cpu": 50.0}
    )
    assert sum(sum(plan.memory[0][tier].values()) for tier in ("gpu", "cpu")) <= 2 * GiB


def test_a_run_that_did_otherwise_than_planned_is_told_with_both_numbers():
    plan = make(2, BIG)
    speed = plan.predicted["decode"]["tokens_per_second"]
    memory = [sum(table["gpu"].values()) for table in plan.memory]
    assert plan.compare({"decode_tokens_per_second": 1.1 * speed, "peak_device_nbytes": memory}) == []
    said = plan.compare({"decode_tokens_per_second": 0.8 * speed, "peak_device_nbytes": [memory[0], memory[1] + GiB]})
    assert len(said) == 2 and "decode" in said[0] and "-20 %" in said[0] and "rank 1: gpu memory peaked at" in said[1]
    host = sum(plan.memory[0]["cpu"].values())
    assert plan.compare({"peak_host_nbytes": [host + 4 * GiB, host]}) == []
    assert "rank 0: cpu memory" in plan.compare({"peak_host_nbytes": [host + 5 * GiB, host]})[0]


def test_slots_of_weights_are_as_large_as_the_ranks_largest_streamed_block():
    plan = make(2, BIG, weights={"cpu": 100.0})
    largest = blocks()["layers/0000"].nbytes, blocks()["head"].nbytes
    assert [memory["gpu"]["weight slots"] for memory in plan.memory] == [3 * nbytes for nbytes in largest]


def test_a_user_may_ask_for_more_of_a_gpu_than_a_run_takes_by_itself():
    machine = Machine("cuda", 20 * GiB, most_memory_nbytes=22 * GiB)
    assert sum(make(machine=machine, gpu_memory="21GiB").memory[0]["gpu"].values()) > 20 * GiB
    with pytest.raises(
        InputError, match="placement.gpu_memory is 23.0 GiB, but the rank with the least has 22.0 GiB to use"
    ):
        make(machine=machine, gpu_memory="23GiB")


# What a plan must not do to rows.


def test_a_cache_without_room_for_a_usual_row_is_refused_with_the_tokens_and_the_remedy():
    for cache in ({"gpu": "10MiB"}, {"disk": "10MiB"}):
        with pytest.raises(
            InputError, match=r"room for \d+ tokens in a tier, a usual row of this run needs 2048: give pl"
        ):
            make(1, BIG, rows=4, cache=cache, max_new_tokens=1500)
    with pytest.raises(InputError, match=r"gpu tier needs .* raise placement\.gpu_memory"):
        make(1, BIG, gpu_memory="700MiB", max_new_tokens=1000)


@pytest.mark.parametrize(
    ("flags", "remedy"),
    [
        (
            {"gpu_memory": "100MiB"},
            "use more ranks, a smaller dtype, fewer pipeline.step_tokens, or raise placement.gpu_memory (on a CPU: all"
            " memory of a rank) (rank 0",
        ),
        ({}, "use more hosts, a smaller dtype, fewer pipeline.step_tokens, or free memory of the host (rank 0"),
        ({"weights": {"gpu": 100.0}}, "lower placement.weights.gpu (100), use more hosts, a smaller dtype"),
    ],
)
def test_on_a_cpu_the_remedies_are_those_that_it_has(flags, remedy):
    with pytest.raises(InputError) as raised:
        make(1, Machine("cpu", 100 << 20, 100 << 20), **flags)
    said = str(raised.value)
    assert said.startswith("a rank needs") and remedy in said and ("gpu_memory" in said) == ("gpu_memory" in flags), (
        said
    )


@pytest.mark.parametrize("flags", [{}, {"gpu_memory": "900MiB"}])
def test_where_tiers_are_one_memory_what_both_need_is_told(flags):
    words = r"a rank needs 1\.2 GiB of memory, the limit is 1\.0 GiB: use more hosts, .* weights in the cpu tier 357\.0 MiB\)"
    with pytest.raises(InputError, match=words):
        make(1, Machine("cpu", GiB, GiB), weights={"cpu": 100.0}, **flags)


def test_rows_that_find_no_room_are_told_of_before_they_are_errors():
    load = Workload(100, 60, 4, 100 * 4, 90)
    run = config.load(None, {"model": "m", "prompts": "p", "output": "o", "cache": {"gpu": "10MiB"}})
    plan = planner.make(Problem(run, SHAPE, blocks(), "bfloat16", 1, BIG, 100, load))
    room = max(plan.of_pool("pages").values()) * 16
    assert 64 <= room < 90 * 16
    for predicted in (False, True):
        said = plan.lines(predicted)[-1]
        assert said.startswith("plan: warning: rows of up to 1,440 tokens") and f"has room for {room:,}" in said
    assert not any("warning" in line for line in make(1, BIG).lines())


@pytest.mark.parametrize("gpu_memory", ["1082MiB", "1411MiB"])
def test_smaller_steps_make_room_for_the_longest_row_though_all_usual_ones_fit(gpu_memory):
    run = config.load(None, {"model": "m", "prompts": "p", "output": "o", "gpu_memory": gpu_memory})
    for longest in (5, 128):
        plan = planner.make(Problem(run, SHAPE, blocks(), "bfloat16", 1, BIG, 10, Workload(10, 60, 4, 50, longest)))
        assert plan.holds(longest)


def test_a_single_gpu_reads_its_weights_once_a_round_since_its_steps_are_composed_ahead():
    small = Workload(64, 100, 100)
    run = config.load(None, {"model": "m", "prompts": "p", "output": "o"})
    groups = {}
    for layers in (2, 80):
        shape = dataclasses.replace(SHAPE, num_layers=layers, hidden_size=8192, cache=())
        layer = {"qkv": (10240, 8192), "out": (8192, 8192), "gate_up": (57344, 8192), "down": (8192, 28672)}
        its = {layer_name(number): lay_out("layer", layer, "bfloat16") for number in range(layers)}
        its |= {name: lay_out(name, shapes, "bfloat16") for name, shapes in ENDS.items()}
        plan = planner.make(Problem(run, shape, its, "bfloat16", 1, Machine("cuda", 200 * GiB), 64, small))
        groups[layers] = plan.groups
    assert groups == {2: 1, 80: 1}
