"""Plans of caches in fewer bits: rows at once, bytes of tiers and buffers beside the tensors of a run, terms, words."""

import pytest
import torch

from noria import config, kinds
from noria.arrays import ENCODINGS, Array
from noria.desk.examination import with_cache
from noria.engine.assembly import _over
from noria.engine.kv_cache import KvCache
from noria.errors import InputError
from noria.model import ModelShape
from noria.plan import building, loads, memory, planner, terms
from noria.plan.costs import Workload, resources
from noria.plan.planner import GiB
from noria.plan.problem import Machine, Problem
from noria.plan.rates import Rates
from noria.plan.rounds import Round
from noria.streams import CpuStreams
from test_costs import OPT_30B, cut_of

LOAD = Workload(2000, 512, 32)


def made(kind, machine, shape=OPT_30B[0], **flags):
    flags = {"model": "m", "prompts": "p", "output": "o", "kv_cache_dtype": kind} | flags
    problem = Problem(config.load(None, flags), with_cache(shape, kind), OPT_30B[1], "float16", 1, machine, 2000, LOAD)
    return planner.make(problem)


@pytest.mark.parametrize(("kind", "least"), [("int8", 1.8), ("fp8", 1.8), ("int4", 3.5)])
@pytest.mark.parametrize(
    ("machine", "flags"),
    [
        (Machine("cuda", 139 * GiB, 128 * GiB), {"microbatch_tokens": 8192}),  # the same for all
        (Machine("cuda", 16 * GiB, 240 * GiB), {"cache": {"cpu": 100.0}}),
    ],
    ids=["on the device", "in CPU memory"],
)
def test_an_encoded_cache_holds_more_rows_at_once(kind, least, machine, flags):
    plain, encoded = made("auto", machine, **flags), made(kind, machine, **flags)
    assert encoded.predicted["rows"] >= least * plain.predicted["rows"]


def test_what_is_planned_is_what_a_run_makes():
    machine = Machine("cuda", 139 * GiB, 128 * GiB)
    small = ModelShape("llama", 3, 512, 4, 2, 128, 1000, 256, False)
    for kind in ENCODINGS:
        shape, plan = with_cache(small, kind), made(kind, machine)
        cache = KvCache(shape, [0, 2], (5, 0), "float16", CpuStreams(torch.device("cpu")))
        assert cache.nbytes == 5 * 16 * shape.cache_nbytes([range(1), range(2, 3)], "float16")
        over = _over(kinds.load("attention", "sdpa"), plan, shape, [0, 2], CpuStreams(torch.device("cpu")))
        assert over.nbytes == plan.decoded_pages * 16 * 2 * 2 * 128 * 2
        cut = cut_of(plan, (with_cache(OPT_30B[0], kind), OPT_30B[1]))
        of_token = cut.share(0).decoding_row
        assert plan.memory[0]["gpu"]["decoded cache"] == plan.decoded_pages * 16 * of_token
        assert of_token == 2 * 7168 * 2 + cut.shape.cache_nbytes([range(1)], "float16")


def test_the_buffer_for_decoded_rows_holds_the_longest():
    long = ModelShape("opt", 48, 7168, 56, 56, 128, 50272, 2**16, True)
    plan = made("int8", Machine("cuda", 139 * GiB, 128 * GiB), long)
    assert plan.decoded_pages == 2**16 // 16


def test_decoding_is_counted_and_the_link_carries_what_is_kept():
    machine, flags = Machine("cuda", 16 * GiB, 240 * GiB), {"cache": {"cpu": 100.0}}
    plan, plain = made("int8", machine, **flags), made("auto", machine, **flags)
    turn, shape = Round(10, 500, chunk_tokens=60, chunk_rows=2, chunk_cached=100), with_cache(OPT_30B[0], "int8")
    of_token = 48 * 56 * (128 + 2 * 2 + 128 + 2)
    assert loads.cache_nbytes(plan, shape, 0, turn)["cpu"]["load"] == pytest.approx((5000 + 200) * of_token)
    work = cut_of(plan, (shape, OPT_30B[1])).share(0).work
    assert loads.cache_decoded(work, turn) == (5000 + 200 + 60) * (of_token + 48 * 7168 * 2 * 2)
    assert loads.cache_decoded(work, turn, in_tiles=True) == (200 + 60) * (of_token + 48 * 7168 * 2 * 2)
    assert plan.predicted["terms"]["prefill"]["decoding"] > 0 == plain.predicted["terms"]["prefill"]["decoding"]
    assert plan.predicted["terms"]["decode"]["decoding"] == 0  # attention decodes what single queries read
    said, before = (one.lines()[0] for one in (plan, plain))
    assert f"{plan.num_pages * 16:,} tokens in int8" in said and "int8" not in before


def test_values_that_lie_within_keys_are_decoded_before_attention_and_captured_in_no_graph():
    machine = Machine("cuda", 139 * GiB, 128 * GiB)
    latents = ModelShape(
        "opt", 48, 7168, 56, 1, 576, 50272, 2048, True, cache=((Array("latent", (576,), value=512),),) * 48
    )
    plan, plain = (made(kind, machine, latents, weights={"gpu": 100.0}) for kind in ("int8", "auto"))
    shape, of_token = with_cache(latents, "int8"), 48 * (576 + 2 * 9 + 576 * 2)
    load = loads.load_of(plan, cut_of(plan, (shape, OPT_30B[1])), 0)
    told = resources(plan, shape, load, Rates(), Round(10, 500))["decoding"]
    assert told == pytest.approx(terms.decoding(10 * 500 * of_token, Rates()))
    assert plan.graph_rows == 0 < plain.graph_rows and not plain.predicted["terms"]["decode"]["decoding"]


@pytest.mark.parametrize("kind", ENCODINGS)
def test_steps_over_a_cache_that_attention_decodes_are_captured_with_room_for_what_they_round(kind, monkeypatch):
    machine, flags = Machine("cuda", 139 * GiB, 128 * GiB), {"weights": {"gpu": 100.0}}
    plan, plain = (made(its, machine, **flags) for its in (kind, "auto"))
    assert plan.graph_rows >= plain.graph_rows > 0 == made(kind, machine, graphs=False, **flags).graph_rows
    monkeypatch.setattr(building, "_graph_rows", lambda *_: 100)
    room, of_token = [], cut_of(plan, (with_cache(OPT_30B[0], kind), OPT_30B[1])).share(0).decoding_row
    for passes in (memory.ROUNDING_PASSES, 0):
        monkeypatch.setattr(memory, "ROUNDING_PASSES", passes)
        room.append(made(kind, machine, **flags).memory[0]["gpu"]["graphs"])
    assert room[0] - room[1] == 100 * 6 * of_token


def test_a_cache_that_is_never_rounded_is_refused_with_the_reason():
    own = ModelShape("turns", 1, 8, 2, 1, 4, 10, 64, False, cache=((Array("sum", (4,), dtype="float64"),),))
    with pytest.raises(InputError, match="kv_cache_dtype is int8: turns keeps sum in a dtype of its own: set auto"):
        with_cache(own, "int8")
    states = ModelShape("turns", 1, 8, 2, 1, 4, 10, 64, False, cache=((Array("sum", (4,), "sequence"),),))
    with pytest.raises(InputError, match="turns leaves no keys and values in a cache"):
        with_cache(states, "fp8")
    assert with_cache(states, "auto") is states
