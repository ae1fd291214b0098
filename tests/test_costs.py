"""Predictions against arithmetic by hand, and against what was measured of the peers' limits."""

from dataclasses import replace
from pathlib import Path

import pytest

import test_admission
from noria import borders, config
from noria.blocks import lay_out, layer_name
from noria.errors import InputError
from noria.model import ModelShape
from noria.pieces import Matrix, Wanted
from noria.plan import costs, loads, planner, rates
from noria.plan.costs import Round, Workload
from noria.plan.cut import Cut
from noria.plan.planner import GiB
from noria.plan.problem import Machine, Problem
from noria.rows.slots import Capacity

H200 = Machine("cuda", 139 * GiB, 128 * GiB)


def opt(layers, hidden, heads, vocab=50272, positions=2048):
    """Shape and float16 blocks of an OPT model."""
    shape = ModelShape("opt", layers, hidden, heads, heads, hidden // heads, vocab, positions, True)
    layer = {
        "qkv": (3 * hidden, hidden),
        "out": (hidden, hidden),
        "up": (4 * hidden, hidden),
        "down": (hidden, 4 * hidden),
    }
    ends = {
        "embed": {"tokens": (vocab, hidden), "positions": (positions + 2, hidden)},
        "head": {"lm_head": (vocab, hidden)},
    }
    names = ends | {layer_name(number): layer for number in range(layers)}
    return shape, {name: lay_out(name, shapes, "float16") for name, shapes in names.items()}


OPT_30B = opt(48, 7168, 56)


def plan_of(made, num_ranks, rows, machine=H200, load=None, **flags):
    flags = {"model": "m", "prompts": "p", "output": "o"} | flags
    run = config.load(None, {name: value for name, value in flags.items() if value is not None})
    return planner.make(Problem(run, *made, "float16", num_ranks, machine, rows, load))


def cut_of(plan, made, dtype="float16"):
    shape, blocks = made
    kinds = tuple(range(shape.num_layers))
    return Cut(shape, blocks, kinds, dtype, plan.num_ranks, tuple(plan.ranges()))


def streamed(num_ranks, **flags):
    return plan_of(OPT_30B, num_ranks, 128, weights={"cpu": 100.0}, load=Workload(128, 512, 32), **flags)


def test_streamed_weights_decode_as_fast_as_the_link():
    found = streamed(1, step_tokens=65536).predicted["decode"]
    assert found["round_seconds"] == pytest.approx(1.09, rel=0.02)
    assert found["tokens_per_second"] == pytest.approx(117, rel=0.02) and found["binds"] == "link"


def test_laps_on_two_ranks_halve_the_time_and_contiguous_stages_do_not():
    one = streamed(1).predicted["decode"]["round_seconds"]
    laps = streamed(2)
    assert laps.laps > 1 and laps.predicted["decode"]["round_seconds"] == pytest.approx(one / 2, rel=0.03)
    contiguous = streamed(2, laps=1, groups=2)
    assert contiguous.predicted["decode"]["round_seconds"] == pytest.approx(one, rel=0.03)


@pytest.mark.parametrize("flags", [{"weights": {"cpu": 100.0}}, {"gpu_memory": "20GiB"}])
def test_laps_that_would_part_tied_layers_are_not_taken(flags):
    shape, blocks = OPT_30B
    tied = replace(shape, cache=(*shape.cache[:2], 1, *shape.cache[3:]))
    plan = plan_of((tied, blocks), 2, 128, load=Workload(128, 512, 32), **flags)
    ranks = {layer: stage % 2 for stage, layers in enumerate(plan.ranges()) for layer in layers}
    assert plan.weight_slots and plan.laps > 1 and ranks[1] == ranks[2], "24 laps would have a layer in each stage"


@pytest.mark.parametrize("flags", [{}, {"weights": {"cpu": 100.0}}, {"gpu_memory": "20GiB"}, {"laps": 2}])
def test_ties_that_no_cut_keeps_are_refused(flags):
    shape, blocks = OPT_30B
    tied = replace(shape, cache=(*shape.cache[:47], 0))
    with pytest.raises(InputError, match=r"\(0, 47\), but no cut of 48 layers into \d+ virtual stages on 2 ranks"):
        plan_of((tied, blocks), 2, 128, load=Workload(128, 512, 32), **flags)


def test_the_bytes_of_weights_a_round_are_those_of_the_streamed_blocks_for_each_time_that_they_are_loaded():
    blocks = OPT_30B[1]
    total = sum(block.nbytes for name, block in blocks.items() if name != "embed")
    laps, contiguous = streamed(2), streamed(2, laps=1, groups=3)
    assert sum(costs.weights_nbytes(laps, blocks, rank)["link"] for rank in (0, 1)) == total
    assert sum(costs.weights_nbytes(contiguous, blocks, rank)["link"] for rank in (0, 1)) == 3 * total
    assert sum(costs.weights_nbytes(laps, blocks, rank)["disk"] for rank in (0, 1)) == 0


def test_the_bytes_of_the_ring_are_tokens_by_hidden_size_by_hops():
    assert costs.ring_nbytes(streamed(2, laps=4), OPT_30B[0], 10) == 10 * 7168 * 2 * 7
    assert costs.ring_nbytes(streamed(1), OPT_30B[0], 10) == 0


def test_the_bytes_of_a_cache_in_cpu_memory_are_those_of_its_tokens():
    plan = plan_of(
        OPT_30B, 1, 144, Machine("cuda", 20 * GiB, 240 * GiB), cache={"cpu": 100.0}, weights={"gpu": 10.0, "cpu": 90.0}
    )
    moved = costs.cache_nbytes(plan, OPT_30B[0], 0, Round(144, 528))["cpu"]
    token = 48 * 2 * 7168 * 2
    assert moved == {"load": 144 * 528 * token, "store": 144 * token}


def test_rows_are_counted_on_the_device_first_as_they_are_admitted():
    """Five rows of four pages: three find room among the device's 12, whatever the other tier could hold."""
    tiers = {"gpu": 12, "cpu": 28}
    prompts = [test_admission.prompt(row, 50, max_new_tokens=10, ignore_eos=True) for row in range(5)]
    limits = Capacity(1, 40, 300, 300, 1, 64, tier_pages=tuple(tiers.values()), slot_pages=8)
    admitted = test_admission.run(prompts, limits)[1][0].admitted
    found = sum(one.runs[0].start < tiers["gpu"] for one in admitted) / len(admitted)
    plan = replace(streamed(1), num_pages=40, pools={tier: {"pages": count} for tier, count in tiers.items()})
    turn = costs.decoding(5, Workload(5, 50, 10))
    assert loads.cache_shares(plan, turn) == pytest.approx({"gpu": found, "cpu": 1 - found}) == {"gpu": 0.6, "cpu": 0.4}
    assert loads.cache_elsewhere(plan, turn) == pytest.approx(0.4)
    more = loads.cache_shares(plan, replace(turn, reserved=100))
    assert more == pytest.approx({"gpu": 0.3, "cpu": 0.7}), "no more than there are"


def test_a_ring_that_is_not_full_takes_as_long_as_a_groups_way_round():
    load = Workload(128, 512, 32)
    two, one = (plan_of(OPT_30B, 2, 128, load=load, groups=groups, laps=1, weights={"gpu": 100.0}) for groups in (2, 1))
    assert one.predicted["decode"]["binds"] == "ring"
    assert two.predicted["decode"]["round_seconds"] < one.predicted["decode"]["round_seconds"]


def test_without_overlap_times_add_up():
    fast, slow = streamed(1), streamed(1, schedule="sequential")
    assert slow.predicted["decode"]["round_seconds"] > fast.predicted["decode"]["round_seconds"]


def test_copies_of_rows_that_decode_are_hidden_by_as_many_microbatches_of_chunks_beside_them():
    """16 layers of an OPT-30B shape with 24 GiB of an H200 and the cache in CPU memory: in a prefill round the link is busy for
    0.629 s and layers compute for 0.494. Of the link's, the caches take 16 * 77 * 518 * 28,672 bytes at 55 GB/s, 0.333 s, in
    microbatches of 585 pages: 4.26 of them."""
    made, load = opt(16, 7168, 56), Workload(192, 512, 12)
    sizes = {"weights": {"gpu": "5GiB", "cpu": "30GiB"}, "cache": {"cpu": 100.0}}

    def round_of(rows, tokens):
        flags = {"step_tokens": 14336, "microbatch_tokens": tokens, "groups": 1, "activations": "gpu"}
        plan = plan_of(made, 1, 192, Machine("cuda", 24 * GiB, 120 * GiB), load, **sizes, **flags)
        cut = cut_of(plan, made)
        ((its, _),) = loads.loads(plan, cut).items()
        return costs.whole_blocks(plan, cut.shape, its, rates.Rates(), Round(rows, 518, 14000, 28, 256))

    many, one = round_of(77, 2047), round_of(77, 14336)
    assert many.seconds == many.terms["link"] == pytest.approx(0.629, rel=0.1)
    assert one.seconds == pytest.approx(0.494 + 0.333 * (1 - 1 / 4.26), rel=0.1) and one.seconds > one.terms["link"]
    assert round_of(0, 2047).seconds < 0.7, "with nothing to load but weights"


def test_rates_come_back_from_the_file_that_they_were_written_to(tmp_path):
    path = tmp_path / "machine.toml"
    measured = rates.Rates(device='H"200', host_to_device=12.3e9, hop_seconds=2e-5)
    path.write_text(measured.to_toml())
    found = rates.read(path)
    assert (found.device, found.host_to_device, found.hop_seconds, found.assumed) == ("H?200", 12.3e9, 2e-5, ())
    path.write_text("host_to_device = 1e9\n")
    assert rates.read(path).host_to_device == 1e9 and "disk_read" in rates.read(path).assumed


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("host_to_devise = 1", "unknown key 'host_to_devise'; did you mean 'host_to_device'?"),
        ("disk_read = 0", "disk_read is 0: it must be a number above 0"),
        ("hop = true", "hop is True: it must be a number above 0"),
        ("[matmul]\nbf16 = 1e12", "unknown dtype 'bf16'"),
        ("matmul = 3", "write [matmul]"),
        ("= 3", "is not TOML"),
    ],
)
def test_a_machine_file_that_is_wrong_is_refused_with_the_key(tmp_path, text, said):
    path = tmp_path / "machine.toml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        rates.read(path)
    assert said in str(caught.value)


def test_a_machine_file_that_is_not_there_is_named_with_the_command_that_makes_it(tmp_path):
    with pytest.raises(InputError, match="noria probe --output"):
        rates.read(tmp_path / "machine.toml")


OPT_175B = opt(96, 12288, 96)
ROWS = Workload(256, 512, 32)


def tiers_of(plan):
    return {tier for held in plan.weight_tiers for tier in held.values()}


def assert_fits(plan, machine):
    for memory in plan.memory:
        assert sum(memory["gpu"].values()) <= machine.memory_nbytes
        assert sum(memory["cpu"].values()) <= machine.cpu_memory_nbytes


@pytest.mark.slow
def test_a_model_that_does_not_fit_one_gpu_is_kept_there_as_far_as_it_goes_and_cpu_memory_has_the_rest():
    machine = Machine("cuda", 125 * GiB, 115 * GiB)
    plan = plan_of(OPT_175B, 2, 256, machine, ROWS)
    assert_fits(plan, machine)
    assert tiers_of(plan) == {"gpu", "cpu"} and plan.laps > 1 and plan.groups >= 2
    assert all(loads.once(plan, rank, lap) for rank in range(2) for lap in range(plan.laps))


@pytest.mark.slow
def test_what_cpu_memory_does_not_hold_is_read_from_disk():
    machine = Machine("cuda", 125 * GiB, 30 * GiB)
    plan = plan_of(OPT_175B, 2, 256, machine, ROWS)
    assert_fits(plan, machine)
    assert "disk" in tiers_of(plan) and plan.predicted["decode"]["binds"] in ("disk", "ring")


def test_random_weights_that_fit_no_memory_are_refused_with_what_is_missing_and_the_way_out():
    with pytest.raises(InputError, match="do not fit on rank 0.*use more ranks, placement.stage = true would keep"):
        plan_of(OPT_175B, 2, 256, Machine("cuda", 125 * GiB, 30 * GiB), ROWS, model=None, random_weights="c.json")


def test_a_small_gpu_with_its_cache_in_cpu_memory_has_the_weights_that_still_fit():
    machine = Machine("cuda", 138 * GiB, 220 * GiB)
    plan = plan_of(OPT_30B, 1, 144, machine, Workload(144, 512, 32, 144 * 36), gpu_memory="16GiB", cache={"cpu": 100.0})
    resident = sum(tier == "gpu" for name, tier in plan.weight_tiers[0].items() if name.startswith("layers/"))
    assert 5 <= resident <= 12 and plan.schedule == "multi_batch" and plan.predicted["rows"] == 144
    assert sum(plan.memory[0]["gpu"].values()) <= 16 * GiB
    assert plan.predicted["decode"]["tokens_per_second"] > 1.8 * 25.5
    assert plan.pools["cpu"]["pages"] == 144 * 36 + 36


def test_resident_layers_make_a_run_at_least_twice_as_fast_as_streaming_all():
    machine, load = Machine("cuda", 138 * GiB, 128 * GiB), Workload(128, 512, 32, 128 * 36)
    plan = plan_of(OPT_30B, 1, 128, machine, load, gpu_memory="130GiB")
    assert sum(plan.memory[0]["gpu"].values()) <= 130 * GiB
    assert plan.predicted["tokens_per_second"] > 2 * streamed(1).predicted["tokens_per_second"]


def test_a_cache_that_must_hold_all_rows_leaves_room_for_thirty_of_forty_eight_layers():
    machine, load = Machine("cuda", 138 * GiB, 128 * GiB), Workload(128, 512, 32, 128 * 36)
    plan = plan_of(OPT_30B, 1, 128, machine, load, gpu_memory="130GiB", cache={"gpu": "90GiB"})
    resident = sum(tier == "gpu" for name, tier in plan.weight_tiers[0].items() if name.startswith("layers/"))
    assert 26 <= resident <= 32 and plan.predicted["rows"] >= 120


def test_one_rank_that_streams_has_one_group_so_that_it_loads_once_a_round():
    plan = streamed(1)
    assert plan.groups == 1 and plan.laps == 1 and plan.step_tokens >= 16384


def test_all_resident_goes_round_once():
    plan = plan_of(opt(32, 4096, 32), 2, 128, H200, Workload(128, 512, 32, 128 * 36))
    assert tiers_of(plan) == {"gpu"} and plan.laps == 1 and plan.groups >= 2


def test_a_small_model_with_many_rows_stays_on_the_gpu():
    plan = plan_of(opt(12, 768, 12), 1, 10**6, Machine("cuda", 20 * GiB, 64 * GiB), Workload(10**6, 512, 256))
    assert tiers_of(plan) == {"gpu"} and plan.groups == 1 and plan.composes_ahead and plan.pools["cpu"]["pages"] == 0


def test_hidden_states_in_host_memory_pass_the_link_between_layers_or_between_ranks():
    plan = plan_of(OPT_30B, 2, 128, activations="cpu", laps=2, groups=2, step_tokens=4096, microbatch_tokens=1024)
    load = loads.load_of(plan, cut_of(plan, OPT_30B), 0)
    prefill, decode = Round(0, 0, 8192, 16, 256), Round(64, 528)
    assert loads.microbatches(plan, prefill) == 4 and loads.microbatches(plan, decode) == 1
    assert loads.states_nbytes(load, 4, prefill) == (8192 * 7168 * 2 * 24,) * 2
    assert loads.states_nbytes(load, 1, decode) == (64 * 7168 * 2 * 2,) * 2
    on_device = streamed(2)
    assert loads.states_nbytes(loads.load_of(on_device, cut_of(on_device, OPT_30B), 0), 4, prefill) == (0, 0)


def test_of_a_mixture_only_the_experts_of_a_token_are_computed_and_those_of_a_step_are_read():
    shape, blocks = opt(8, 4096, 32)
    experts = {"router": (8, 4096), "experts": (8, 4096, 4096)}
    blocks |= {layer_name(layer): lay_out(layer_name(layer), experts, "float16") for layer in range(8)}
    known = rates.assumed("cuda")
    found = {}
    for share in (1.0, 0.25):
        mixture = replace(shape, experts_share=share)
        plan = plan_of((mixture, blocks), 1, 64, load=Workload(64, 512, 32))
        found[share] = costs.resources(
            plan, mixture, loads.load_of(plan, cut_of(plan, (mixture, blocks)), 0), known, Round(1, 0)
        )
    dense, sparse = found[1.0], found[0.25]
    assert sparse["device memory"] < 0.5 * dense["device memory"] and sparse["matmul"] < 0.5 * dense["matmul"]


# Whole runs beside what was measured of them on H200s (jobs/bench/README.md), with the plans that they had.

HERE = Machine("cuda", int(134.5e9), int(120.7e9))
KNOWN = rates.read(Path(__file__).parent / "data" / "noria-rates-h200.toml")


def llama(layers, hidden, heads, kv_heads, inner, vocab, experts=0):
    """Shape and bfloat16 blocks of a Llama; of a mixture of which 8 experts have a token."""
    share = 8 / experts if experts else 1.0
    shape = ModelShape("llama", layers, hidden, heads, kv_heads, 128, vocab, 4096, False, experts_share=share)
    layer = {"qkv": ((heads + 2 * kv_heads) * 128, hidden), "out": (hidden, heads * 128)}
    up, down = Matrix("gate_up", (inner, hidden)), Matrix("down", (hidden, inner), transposed=True)
    if experts:
        layer |= {"router": (experts, hidden), "experts": Wanted((experts, 3 * inner, hidden), None, (up, up, down))}
    else:
        layer |= {"gate_up": (2 * inner, hidden), "down": (hidden, inner)}
    names = {"embed": {"tokens": (vocab, hidden)}, "head": {"lm_head": (vocab, hidden)}}
    names |= {layer_name(number): layer for number in range(layers)}
    return shape, {name: lay_out(name, shapes, "bfloat16") for name, shapes in names.items()}


LLAMA_8B = llama(32, 4096, 32, 8, 14336, 128256)
QWEN3_30B = llama(48, 2048, 32, 4, 768, 151936, experts=128)
CPU = {"weights": {"cpu": 100.0}}


def predicted(made, num_ranks, load, dtype, machine=HERE, **flags):
    run = config.load(None, {"model": "m", "prompts": "p", "output": "o"} | flags)
    return planner.make(Problem(run, *made, dtype, num_ranks, machine, load.num_rows, load), KNOWN).predicted


@pytest.mark.parametrize(
    ("num_ranks", "load", "flags", "prefill", "decode"),
    [
        (1, Workload(64, 512, 12), CPU | {"step_tokens": 65536}, 3.88, 1.082),
        (1, Workload(128, 512, 32), CPU | {"step_tokens": 16384}, 16384 / 8795, 1.080),
        (2, Workload(64, 512, 12), CPU, None, 0.554),
        (1, Workload(128, 512, 32), CPU | {"step_tokens": 65536, "schedule": "sequential"}, None, 1.29),
        (1, Workload(64, 512, 12), {"gpu_memory": "16GiB", "cache": {"cpu": 100.0}, "microbatches": 4}, None, 1.66),
    ],
)
def test_rounds_of_opt_30b_take_what_they_took(num_ranks, load, flags, prefill, decode):
    found = predicted(OPT_30B, num_ranks, load, "float16", **flags)
    assert found["decode"]["round_seconds"] == pytest.approx(decode, rel=0.12)
    assert prefill is None or found["prefill"]["round_seconds"] == pytest.approx(prefill, rel=0.1)


@pytest.mark.parametrize(
    ("made", "num_ranks", "load", "speed"),
    [
        (LLAMA_8B, 1, Workload(1024, 512, 128), 6966),
        (LLAMA_8B, 1, Workload(256, 512, 256), 9379),
        (LLAMA_8B, 1, Workload(128, 512, 256), 8626),
        (LLAMA_8B, 1, Workload(16, 512, 400), 2408),
        (LLAMA_8B, 2, Workload(1024, 512, 128), 11321),
        (QWEN3_30B, 1, Workload(512, 512, 128), 8467),
        (LLAMA_8B, 1, Workload(512, 2200, 64, shared_tokens=1980), 6492),
    ],
)
def test_resident_runs_are_as_fast_as_they_were(made, num_ranks, load, speed):
    assert predicted(made, num_ranks, load, "bfloat16")["tokens_per_second"] == pytest.approx(speed, rel=0.15)


# Cut to 16 layers, medians of three runs in one process (jobs/bench/planned.py), which were not there when the terms were set.
# Many rows of a mixture: of six runs on two machines, 13,840 to 16,213.
LLAMA_16 = llama(16, 4096, 32, 8, 14336, 128256)
MIXTURE_16 = llama(16, 2048, 32, 4, 768, 151936, experts=128)


@pytest.mark.parametrize(
    ("made", "load", "speed"),
    [
        (LLAMA_16, Workload(1024, 512, 64), 8172),
        (LLAMA_16, Workload(16, 512, 256), 4664),
        (LLAMA_16, Workload(4096, 64, 32), 22947),
        (MIXTURE_16, Workload(512, 512, 64), 14960),
        (MIXTURE_16, Workload(16, 512, 128), 3297),
    ],
)
def test_short_resident_runs_are_as_fast_as_they_were(made, load, speed):
    assert predicted(made, 1, load, "bfloat16")["tokens_per_second"] == pytest.approx(speed, rel=0.15)


def test_rounds_that_have_a_few_tokens_more_than_a_step_have_no_more_microbatches():
    plan = plan_of(LLAMA_8B, 1, 256, load=Workload(256, 512, 128), step_tokens=2**16, microbatch_tokens=2**14)
    cut = borders.cut([512] * 128, 2**14, 1)
    assert loads.microbatches(plan, Round(0.5, 576, 2**16, 128, 256)) == len(cut) - 1 == 4
    assert loads.microbatches(plan, Round(0.5, 576, 2**15, 64, 256)) == 3


def planned(dtype, load=Workload(100, 512, 128), **flags):
    run = config.load(None, {"model": "m", "prompts": "p", "output": "o"} | flags)
    return planner.make(Problem(run, *LLAMA_8B, dtype, 1, HERE, load.num_rows, load), KNOWN)


def test_room_is_kept_for_graphs_where_decode_steps_are_captured_alone():
    plan = planned("bfloat16")
    assert plan.graph_rows >= 100 and 96 << 20 < plan.memory[0]["gpu"]["graphs"] < 1 << 30
    others = planned("bfloat16", graphs=False), planned("float32"), planned("bfloat16", activations="cpu")
    for other in (*others, planned("bfloat16", weights={"cpu": 100.0})):
        assert not other.graph_rows and "graphs" not in other.memory[0]["gpu"]


def test_steps_are_captured_of_more_rows_than_find_room_with_their_limits_but_not_than_with_their_prompts():
    for limit, least, most in (
        (4096, 100, 128),
        (64, 200, 400),
    ):  # 15 rows run to their limit; some 300 prompts find room
        plan = planned("bfloat16", Workload(2048, 128, limit), gpu_memory="24GiB")
        assert least <= plan.graph_rows <= most, plan.graph_rows


@pytest.mark.parametrize(("num_ranks", "seconds"), [(1, 1.0991), (2, 0.5595)])
def test_a_streamed_mixture_decodes_as_fast_as_it_did(num_ranks, seconds):
    found = predicted(QWEN3_30B, num_ranks, Workload(256, 512, 32), "bfloat16", compress_weights="off", **CPU)
    assert found["decode"]["round_seconds"] == pytest.approx(seconds, rel=0.03)


def test_each_term_of_both_phases_is_told_and_explains_the_round():
    found = predicted(LLAMA_8B, 2, Workload(1024, 512, 128), "bfloat16")
    for phase in ("prefill", "decode"):
        terms, binds = found["terms"][phase], found[phase]["binds"]
        assert set(terms) == {*costs.TERMS, "ring"} and binds in terms
        assert terms.get(binds, 0) <= found[phase]["round_seconds"] * 1.001
    total = sum(found["rounds"][phase] * found[phase]["round_seconds"] for phase in ("prefill", "decode"))
    assert found["seconds"] == pytest.approx(total)


def test_without_the_others_a_term_is_what_binds():
    slow = {"link": {"host_to_device": 1e9, "both_directions": 1e9}, "matmul": {"matmul": {"float16": 1e12}, "matmul_rows": {}},
            "launches": {"layer_seconds": 1.0}}  # fmt: skip
    run = config.load(None, {"model": "m", "prompts": "p", "output": "o"} | CPU)
    problem = Problem(run, *OPT_30B, "float16", 1, HERE, 128, Workload(128, 512, 32))
    for binds, changed in slow.items():
        assert planner.make(problem, replace(KNOWN, **changed)).predicted["prefill"]["binds"] == binds


def mixture_plan(rows, made=QWEN3_30B, num_ranks=1, **flags):
    """The plan of so many rows of 512 + 64 tokens."""
    load = Workload(rows, 512, 64)
    run = config.load(None, {"model": "m", "prompts": "p", "output": "o", "compress_weights": "off"} | flags)
    return planner.make(Problem(run, *made, "bfloat16", num_ranks, HERE, rows, load), KNOWN)


def test_few_rows_of_a_streamed_mixture_have_their_expected_experts_alone_cross_the_link():
    plan, (_, blocks) = mixture_plan(8, **CPU), QWEN3_30B
    streamed = sum(block.nbytes for name, block in blocks.items() if name != "embed")
    experts = 48 * 128 * 3 * 768 * 2048 * 2
    moved = streamed - experts * (1 - 8 / 128) ** 8  # what none of the 8 tokens goes to stays
    link = plan.predicted["terms"]["decode"]["link"]
    assert link == pytest.approx(moved / KNOWN.host_to_device + 48 * 0.3e-3, rel=1e-3)
    assert link < plan.predicted["decode"]["round_seconds"] < 0.65 * streamed / KNOWN.host_to_device
    assert costs.weights_nbytes(plan, blocks, 0, costs.touched(QWEN3_30B[0], 8))["link"] == pytest.approx(
        moved, rel=1e-3
    )


def test_chosen_experts_are_loaded_for_as_many_tokens_as_that_is_faster():
    most = mixture_plan(8, **CPU).chosen_tokens
    assert 16 < most < 100
    streamed = sum(block.nbytes for name, block in QWEN3_30B[1].items() if name != "embed") / KNOWN.host_to_device
    few, many = (mixture_plan(rows, **CPU).predicted["terms"]["decode"]["link"] for rows in (most, most + 8))
    assert few < 0.97 * streamed and many == pytest.approx(streamed, rel=1e-3)
    assert mixture_plan(8, LLAMA_8B, **CPU).chosen_tokens == 0, "it has no experts"
    assert mixture_plan(8).chosen_tokens == 0, "its layers stay on the device"
    assert mixture_plan(64, num_ranks=2, **CPU).chosen_tokens > 16, "of several groups one is left in the end"
