"""Plans of models with windows: memory holds a window a row in windowed layers, and more rows; all tokens where that takes less."""

from dataclasses import replace
from functools import cache

import pytest

from noria import config
from noria.arrays import Array
from noria.checkpoint.checkpoint import block_names, model_block, model_shape
from noria.desk.examination import with_cache
from noria.model import ModelShape
from noria.plan import planner
from noria.plan.costs import Workload
from noria.plan.planner import GiB
from noria.plan.problem import Machine, Problem
from test_decoder_sizes import NAMES, SIZES

MACHINE = Machine("cuda", 138 * GiB, 256 * GiB, 512 * GiB)
LONG = Workload(4000, 7936, 256)
RING = 1088  # a window of 1,024 tokens: 17 blocks


@cache
def gemma3():
    family, sizes, keys, _ = SIZES["Gemma-3-27B"]
    config = {"model_type": family, "sliding_window": 1024, **dict(zip(NAMES, sizes, strict=True)), **keys}
    module, shape = model_shape(config, "gemma")
    return shape, {name: model_block(module, shape, name, "bfloat16") for name in block_names(shape)}


def plan_of(load=LONG, shape=None, num_ranks=1, **flags):
    run = config.load(None, {"model": "m", "prompts": "p", "output": "o"} | flags)
    whole, blocks = gemma3()
    return planner.make(Problem(run, shape or whole, blocks, "bfloat16", num_ranks, MACHINE, load.num_rows, load))


def all_kept(shape: ModelShape) -> ModelShape:
    """The model as if nobody knew of its windows."""
    entries = (tuple(replace(array, window=None) for array in entry) for entry in shape.cache)
    return replace(shape, cache=tuple(entries))


def test_more_rows_of_gemma_3_27b_are_in_flight_at_8k_tokens():
    shape, _ = gemma3()
    windows = [entry[0].window for entry in shape.cache]
    assert windows.count(1024) == 52 and windows.count(None) == 10
    kept, whole = plan_of(), plan_of(shape=all_kept(shape))
    token = 2 * 16 * 128 * 2  # bytes in a layer
    row = token * (10 * 8192 + 52 * RING)
    assert kept.pools["gpu"]["states"] == -(-kept.pools["gpu"]["pages"] // 512) + 1
    assert (
        kept.memory[0]["gpu"]["cache"]
        == kept.pools["gpu"]["pages"] * 16 * token * 10 + kept.pools["gpu"]["states"] * 52 * RING * token
    )
    rows = [plan.memory[0]["gpu"]["cache"] // each for plan, each in ((kept, row), (whole, token * 62 * 8192))]
    print(f"rows in flight: {rows[0]} with windows, {rows[1]} without")
    assert abs(kept.predicted["rows"] - rows[0]) <= 1 and whole.predicted["rows"] == rows[1]
    # Steps with chunks wait for their launches: with windows the plan takes larger ones, whose work space is that of 6 rows.
    assert rows[0] >= 3.3 * rows[1]
    assert kept.rings and not whole.rings and sum(kept.memory[0]["gpu"].values()) <= 138 * GiB


@pytest.mark.parametrize("flags", [{"cache": {"cpu": 100.0}}, {"cache": {"gpu": 40.0, "cpu": 60.0}}])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_every_tier_and_rank_counts_its_windows(num_ranks, flags):
    plan = plan_of(num_ranks=num_ranks, **flags)
    shape = gemma3()[0].with_rings()
    for rank in range(num_ranks):
        layers = plan.ranges()[rank::num_ranks]
        page, ring = 16 * shape.cache_nbytes(layers, "bfloat16"), shape.cache_nbytes(layers, "bfloat16", "sequence")
        for tier, pools in plan.pools.items():
            assert plan.memory[rank][tier].get("cache", 0) == pools["pages"] * page + pools["states"] * ring


def test_the_plan_says_what_windowed_layers_keep():
    assert "plan: 52 layers with windows keep the last 1,088 tokens of a row" in plan_of().lines()
    assert f" and {plan_of().pools['gpu']['states']:,} windows" in plan_of().lines()[0]


SHORT = {
    "short rows": (Workload(4000, 500, 100), {}, "a row's windows would take no less"),
    "rows that may end early": (Workload(4000, 128, 4096), {}, "a row's windows would take no less"),
    "a long beginning that is shared": (
        Workload(4000, 2200, 64, shared_tokens=2000),
        {},
        "a row's windows would take no less",
    ),
    "an encoded cache": (LONG, {"kv_cache_dtype": "int8"}, "the cache is encoded"),
}


@pytest.mark.parametrize("case", SHORT)
def test_all_tokens_are_kept_where_that_takes_less_and_the_plan_says_why(case):
    load, flags, words = SHORT[case]
    shape = with_cache(gemma3()[0], flags.get("kv_cache_dtype", "auto"))
    plan = plan_of(load, shape, **flags)
    said = [line for line in plan.lines() if line.startswith("plan: 52 layers with windows keep all tokens of a row: ")]
    assert len(said) == 1 and words in said[0]
    assert not plan.rings and plan.pools["gpu"]["states"] == 0


def test_rows_that_never_end_early_are_counted_whole():
    assert not plan_of(Workload(4000, 128, 4096)).rings and plan_of(Workload(4000, 128, 4096), ignore_eos=True).rings


def test_a_layer_that_others_read_keeps_all_and_the_plan_says_so():
    shape, _ = gemma3()
    entries = [*shape.cache[:-1], 0]  # the last one reads the first
    plan = plan_of(shape=replace(shape, cache=tuple(entries)))
    kept = sum(array[0].window is not None for array in shape.cache[1:-1])
    assert (
        f"plan: {kept} layers with windows keep the last 1,088 tokens of a row; 1 other, which later layers read, all"
        in plan.lines()
    )


def test_a_family_with_states_too_keeps_all():
    shape, _ = gemma3()
    entries = ((Array("state", (4,), "sequence"),), *shape.cache[1:])
    assert "the family has states too" in plan_of(shape=replace(shape, cache=entries)).windows
