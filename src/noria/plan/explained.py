"""Why a plan is as fast as it is: the terms of its prediction, what binds, and its memory by tier as a table.

Knows not how the plan was found.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from noria.limits import TIERS
from noria.plan.plan import Plan
from noria.tools.text import nbytes_words, plural, seconds_words

PHASES = ("prefill", "decode")


def binding(plan: Plan) -> tuple[str, str, float]:
    """The phase that most of the time goes to, what binds it, and its share of the time."""
    seconds = phase_seconds(plan)
    phase = max(PHASES, key=seconds.__getitem__)
    return phase, plan.predicted[phase]["binds"], seconds[phase] / max(sum(seconds.values()), 1e-12)


def phase_seconds(plan: Plan) -> dict[str, float]:
    """Seconds of all rounds of each phase."""
    predicted = plan.predicted
    return {phase: predicted["rounds"][phase] * predicted[phase]["round_seconds"] for phase in PHASES}


def binding_words(plan: Plan) -> str:
    """`link in decode, which is 83 % of the time; next is device memory, busy for 31 % of a round`."""
    phase, binds, share = binding(plan)
    predicted, terms = plan.predicted[phase], plan.predicted["terms"][phase]
    words = f"{binds} in {phase}, which is {100 * share:.0f} % of the time"
    others = {name: seconds for name, seconds in terms.items() if name not in (binds, "ring", "hops")}
    if not others:
        return words
    following = max(others, key=others.__getitem__)
    busy = 100 * others[following] / max(predicted["round_seconds"], 1e-12)
    return f"{words}; next is {following}, busy for {busy:.0f} % of a round"


def stage_words(plan: Plan) -> str:
    """`8 virtual stages of 12 or 13 layers, one a rank and lap`."""
    counts = sorted({len(layers) for layers in plan.ranges()})
    sizes = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    layers = plural(counts[0], "layer") if counts == [1] else f"{sizes} layers"
    return f"{plural(len(plan.stages), 'virtual stage')} of {layers}, one a rank and lap"


def rehearsed_words(plan: Plan) -> str:
    """What a dry run of messages made of the terms: of the plan of ranks that nobody measured."""
    said = (
        f"{phase} {seconds_words(plan.predicted[phase]['round_seconds'])} a round"
        f" ({seconds_words(plan.predicted['rehearsed'][phase])} by the terms alone)"
        for phase in PHASES
    )
    words = f"a dry run of the messages of {plural(plan.num_ranks, 'rank')}, with measured terms"
    return f"predicted by {words}: {', '.join(said)}; other plans below by the terms alone"


def term_lines(plan: Plan) -> Iterator[str]:
    """The terms as a table: seconds of a round that keep each resource of the busiest rank busy, and the rounds."""
    terms = plan.predicted["terms"]
    rows: list[tuple[str, ...]] = [("seconds of a round", *PHASES)]
    for name in terms["decode"]:
        busy = (terms[phase][name] for phase in PHASES)
        rows.append((name, *(seconds_words(seconds) if seconds else "-" for seconds in busy)))
    rows.append(("a round", *(seconds_words(plan.predicted[phase]["round_seconds"]) for phase in PHASES)))
    rows.append(("rounds", *(f"{plan.predicted['rounds'][phase]:,.0f}" for phase in PHASES)))
    rows.append(("all rounds", *map(seconds_words, phase_seconds(plan).values())))
    return table(rows)


def memory_lines(plan: Plan, limits: Mapping[str, int]) -> Iterator[str]:
    """Memory by rank and tier as a table, ranks that have the same as one; `limits`: bytes of a tier that a rank may use."""
    used = [tier for tier in TIERS if any(sum(tables[tier].values()) for tables in plan.memory)]
    purposes = [dict.fromkeys(name for tables in plan.memory for name in tables[tier]) for tier in used]
    named = list(dict.fromkeys(name for names in purposes for name in names))
    rows = [("rank", "tier", "limit", "used", "layers", *named)]
    for ranks, tables in _alike(plan):
        for tier in used:
            sizes = tables[tier]
            held = _layers(plan, ranks[0], tier)
            limit = nbytes_words(limits[tier]) if limits[tier] < 1 << 60 else "-"
            cells = [nbytes_words(sizes[name]) if sizes.get(name) else "-" for name in named]
            rows.append((_span(ranks), plan.tier_words(tier), limit, nbytes_words(sum(sizes.values())), held, *cells))
    return table(rows)


def _alike(plan: Plan) -> Iterator[tuple[list[int], Mapping[str, Any]]]:
    """Neighbouring ranks whose memory is used alike, and how."""

    def use(rank: int) -> tuple[Any, ...]:
        return plan.memory[rank], [_layers(plan, rank, tier) for tier in TIERS]

    for _, ranks in groupby(range(plan.num_ranks), use):
        found = list(ranks)
        yield found, plan.memory[found[0]]


def _layers(plan: Plan, rank: int, tier: str) -> str:
    """How many of the rank's layers a tier holds."""
    layers = [at for name, at in plan.weight_tiers[rank].items() if name.startswith("layers/")]
    return f"{layers.count(tier)} of {len(layers)}"


def _span(ranks: Sequence[int]) -> str:
    return f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"


def table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of columns that are as wide as their widest cell: the first one to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = (f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True))
        yield "  ".join((f"{first:<{widths[0]}}", *cells)).rstrip()


def plan_as_dict(plan: Plan) -> dict[str, Any]:
    """The plan for scripts: its choices, its memory by rank and tier, what binds it and the terms of its prediction."""
    chosen = plan.as_dict()
    predicted, memory = chosen.pop("predicted"), chosen.pop("memory")
    return {
        "plan": chosen,
        "memory": [{"rank": rank, **tables} for rank, tables in enumerate(memory)],
        "binds": binding(plan)[1],
        "terms": predicted.pop("terms"),
        "predicted": predicted,
    }


def told_as_dict(change: str, plan: Plan | None, beside: Plan, refused: str = "") -> dict[str, Any]:
    """A plan of something changed, for scripts: its choices in few numbers, and how many times as fast it is."""
    if plan is None:
        return {"change": change, "refused": refused}
    names = ("num_ranks", "laps", "groups", "schedule", "step_tokens", "microbatch_tokens", "activations")
    speed, seconds = (plan.predicted[name] for name in ("tokens_per_second", "seconds"))
    return {
        "change": change,
        **{name: getattr(plan, name) for name in names},
        "pages": plan.of_pool("pages"),
        "predicted": {"tokens_per_second": speed, "seconds": seconds},
        "times": times_as_fast(plan, beside),
    }


def times_as_fast(plan: Plan, beside: Plan) -> float:
    """Tokens/s of one plan as a multiple of another's."""
    return plan.predicted["tokens_per_second"] / max(beside.predicted["tokens_per_second"], 1e-12)
