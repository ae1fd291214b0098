"""Predictions against arithmetic by hand, and against what was measured of the peers' limits."""

import pytest

from noria import config
from noria.blocks import ModelShape, lay_out, layer_name
from noria.config import InputError
from noria.plan import costs, planner, rates
from noria.plan.costs import Load, Round
from noria.plan.planner import GiB, Machine

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


def plan_of(model, num_ranks, rows, machine=H200, load=None, **flags):
    run = config.load(None, {"model": "m", "prompts": "p", "output": "o", **flags})
    return planner.make(run, *model, "float16", num_ranks, machine, rows, load)


def streamed(num_ranks, **flags):
    return plan_of(OPT_30B, num_ranks, 128, weights={"cpu": 100.0}, load=Load(128, 512, 32), **flags)


def test_streamed_weights_decode_as_fast_as_the_link():
    found = streamed(1).predicted["decode"]
    assert found["round_seconds"] == pytest.approx(1.09, rel=0.02)
    assert found["tokens_per_second"] == pytest.approx(117, rel=0.02) and found["binds"] == "link"


def test_laps_on_two_ranks_halve_the_time_and_contiguous_stages_do_not():
    one = streamed(1).predicted["decode"]["round_seconds"]
    laps = streamed(2)
    assert laps.laps > 1 and laps.predicted["decode"]["round_seconds"] == pytest.approx(one / 2, rel=0.03)
    contiguous = streamed(2, laps=1, groups=2)
    assert contiguous.predicted["decode"]["round_seconds"] == pytest.approx(one, rel=0.03)


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
    moved = costs.cache_nbytes(plan, OPT_30B[0], 0, Round(144, 144, 528, False))["cpu"]
    token = 48 * 2 * 7168 * 2
    assert moved == {"load": 144 * 528 * token, "store": 144 * token}


def test_a_ring_that_is_not_full_takes_as_long_as_a_groups_way_round():
    load = Load(128, 512, 32)
    two, one = (plan_of(OPT_30B, 2, 128, load=load, groups=groups, laps=1, weights={"gpu": 100.0}) for groups in (2, 1))
    assert one.predicted["decode"]["binds"] == "ring"
    assert two.predicted["decode"]["round_seconds"] < one.predicted["decode"]["round_seconds"]


def test_without_overlap_times_add_up():
    fast, slow = streamed(1), streamed(1, schedule="sequential")
    assert slow.predicted["decode"]["round_seconds"] > fast.predicted["decode"]["round_seconds"]


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
