"""Rates as data: what a machine.toml says, what is refused in one, and starting values of well-known GPUs."""

import math
from dataclasses import replace

import pytest

from noria.errors import InputError
from noria.plan import rates
from noria.plan.cards import CARDS, card_of
from noria.plan.rates import Node

MEASURED = replace(
    rates.assumed("cuda"),
    device="NVIDIA H200",
    assumed=(),
    matmul_rows={"bfloat16": {1: 4e12, 64: 2.5e14, 4096: 7.9e14}},
    node=Node(2, 1, 16, "580.95.05", "Xeon"),
    transport="mpi_device",
    scratch="/local",
    measured="2026-11-29T14:00:00Z",
)


def written(tmp_path, text):
    path = tmp_path / "machine.toml"
    path.write_text(text)
    return path


def test_all_that_rates_say_comes_back_from_their_file(tmp_path):
    assert rates.read(written(tmp_path, MEASURED.to_toml())) == MEASURED
    assert rates.parse(MEASURED.to_toml()) == MEASURED
    partly = replace(MEASURED, assumed=("disk_read", "disk_write", "matmul.float16"), standing=rates.DOUBTED)
    assert rates.parse(partly.to_toml()) == partly


def test_a_file_of_an_earlier_version_reads_as_it_did(tmp_path):
    found = rates.read(written(tmp_path, 'device = "NVIDIA H200"\nhop = 2.9e11\n\n[matmul]\nfloat16 = 7e14\n'))
    assert (found.hop, found.matmul["float16"], found.node) == (2.9e11, 7e14, Node())
    assert not {"hop", "matmul.float16"} & set(found.assumed) and {"disk_read", "matmul.float32"} <= set(found.assumed)
    assert [found.matmul_at("float16", rows) for rows in (1, 1e6)] == [7e14, 7e14]


def test_a_product_between_two_measured_numbers_of_rows_lies_on_their_line():
    assert [MEASURED.matmul_at("bfloat16", rows) for rows in (64, 4096, 1e6)] == [2.5e14, 7.9e14, 7.9e14]
    assert MEASURED.matmul_at("bfloat16", 8) == pytest.approx(math.sqrt(4e12 * 2.5e14))
    half = replace(MEASURED, matmul_rows={"bfloat16": {16: 6e13}})
    assert half.matmul_at("bfloat16", 4) == pytest.approx(1.5e13), "as long as 16 rows take"
    noisy = replace(MEASURED, matmul_rows={"bfloat16": {16: 6e13, 1024: 8e14, 4096: 7.6e14}})
    assert [noisy.matmul_at("bfloat16", rows) for rows in (1024, 2048, 1e5)] == [7.6e14] * 3, (
        "a clock that does not last"
    )


def test_a_cpu_may_multiply_some_rows_slower_than_fewer():
    cpu = replace(rates.assumed("cpu"), matmul_rows={"float32": {1: 4e10, 4: 1.6e11, 16: 1.2e11, 4096: 1.2e12}})
    assert [cpu.matmul_at("float32", rows) for rows in (4, 16)] == [1.6e11, 1.2e11]
    assert replace(cpu, device="NVIDIA H200").matmul_at("float32", 16) == 1.6e11


def test_what_is_measured_in_part_keeps_the_rest_of_what_was_measured_before():
    old = replace(MEASURED, assumed=("hop", "hop_seconds"), transport="", disk_read=3e9)
    new = replace(
        rates.assumed("cuda"),
        hop=1e11,
        assumed=tuple(name for name in rates.assumed("cuda").assumed if name not in ("hop", "matmul.float64")),
        matmul=rates.assumed("cuda").matmul | {"float64": 5e13},
        transport="mpi_host",
    )
    found = rates.joined(old, new)
    assert (found.hop, found.disk_read, found.matmul["float64"]) == (1e11, 3e9, 5e13)
    assert found.assumed == ("hop_seconds",) and (found.transport, found.scratch) == ("mpi_host", "/local")


def test_only_what_a_run_needs_counts_as_assumed():
    known = rates.assumed("cuda")
    assert {"disk_read", "matmul.float16"} <= set(known.needed("float16", disk=True).assumed)
    left = known.needed("float16", disk=False).assumed
    assert "matmul.float16" in left and not {"disk_read", "disk_write", "matmul.float32"} & set(left)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("hop = nan", "hop is nan: it must be a number above 0"),
        ("hop = inf", "hop is inf: it must be a number above 0"),
        ("hop_seconds = -1e-5", "hop_seconds is -1e-05: it must be a number above 0"),
        ("host_to_device = 55.5", "host_to_device is 55.5 bytes/s: it must be between 1e+06 and 1e+15"),
        ("hop_seconds = 15", "hop_seconds is 15 seconds: it must be between 1e-09 and 10"),
        ("device_capacity = 141", "device_capacity is 141 bytes: it must be between"),
        ("[matmul]\nfloat16 = 788", "matmul.float16 is 788 flop/s: it must be between"),
        ("[matmul_rows.float16]\n16 = 0", "matmul_rows.float16.16 is 0: it must be a number above 0"),
        ("[matmul_rows.float16]\nmany = 1e14", "'many' in [matmul_rows.float16] is not a number of rows"),
        ("[matmul_rows]\nfloat16 = 1e14", "matmul_rows.float16 is 100000000000000.0: write [matmul_rows.float16]"),
        ("[matmul_rows.fp16]\n1 = 1e14", "unknown dtype 'fp16' in [matmul_rows]"),
        ("ranks = 'two'", "ranks is 'two': it must be a whole number"),
        ("ranks = true", "ranks is True: it must be a whole number"),
        ("device = 3", "device is 3: it must be a text"),
        ("measured = 2026-01-01", "measured is datetime.date(2026, 1, 1): it must be a text"),
        (
            "measured = 'yesterday'",
            "measured is 'yesterday': it must be a time as \"2026-11-29T15:11:36Z\", or left out",
        ),
        ("standing = 'blessed'", "standing is 'blessed': it must be one of checked, doubted, confirmed"),
    ],
)
def test_a_machine_file_that_lies_is_refused_with_the_key_and_the_value(tmp_path, text, said):
    with pytest.raises(InputError) as caught:
        rates.read(written(tmp_path, text))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB"),
        ("NVIDIA A100-PCIE-40GB", "NVIDIA A100 40GB"),
        ("NVIDIA A100 80GB PCIe", "NVIDIA A100 80GB PCIe"),
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB"),
        ("h100", "NVIDIA H100 80GB"),
        ("NVIDIA H200", "NVIDIA H200"),
        ("NVIDIA L40S", "NVIDIA L40S"),
        ("NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 4090"),
        ("NVIDIA B200", "NVIDIA B200"),
    ],
)
def test_a_card_is_known_by_the_name_that_cuda_or_a_person_gives_it(tmp_path, monkeypatch, name, device):
    monkeypatch.chdir(tmp_path)
    found = rates.assumed(name)
    assert found.device == device and len(found.assumed) > 12
    assert rates.read(name) == found, "--machine takes it, where no file has that name"


def test_an_unknown_card_is_none_and_a_file_wins_over_a_card_of_its_name(tmp_path, monkeypatch):
    assert [card_of(name) for name in ("NVIDIA L40", "NVIDIA GB200", "CPU", "")] == [None] * 4
    monkeypatch.chdir(tmp_path)
    (tmp_path / "h100").write_text("hop = 1e9\n")
    assert rates.read("h100").hop == 1e9
    with pytest.raises(InputError, match="noria probe --output"):
        rates.read("h100.toml")


def test_no_card_is_taken_to_do_more_than_its_data_sheet_says():
    for card in CARDS:
        found = rates.assumed(card.device)
        assert found.device_memory <= card.memory and found.host_to_device <= card.link and card.source
        assert found.device_capacity <= card.capacity and found.matmul["bfloat16"] <= card.half


def test_a_kind_of_node_includes_those_that_say_the_same_and_more():
    here = Node(2, 1, 16, "580.95.05", "Xeon")
    assert Node().includes(here) and Node(ranks=2, cpu="Xeon").includes(here) and here.includes(here)
    assert not here.includes(Node(2, 2, 16, "580.95.05", "Xeon")), "messages pass a network"
    assert replace(here, hosts=4).includes(replace(here, hosts=2))
    assert not here.includes(replace(here, ranks=8)) and not here.includes(replace(here, driver="570.1"))
