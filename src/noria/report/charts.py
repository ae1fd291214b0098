"""The pictures of a report's page: inline SVG and bars of plain HTML, which grow with the page. No script, nothing fetched."""

from collections.abc import Iterator
from itertools import groupby

from noria.plan.plan import rate_words
from noria.report.counted import Lengths, Speed
from noria.report.markup import safe
from noria.report.measured import RankTime
from noria.tools.text import seconds_words

WIDTH, HEIGHT = 1000, 200  # of a picture's own units; it is stretched to the page's width
STEPS = (1, 1.5, 2, 3, 4, 5, 6, 8)


def speeds_chart(speeds: list[Speed]) -> str:
    """Generated and prompt tokens/s over the time that the jobs worked, a line each."""
    end, most = speeds[-1].stop or 1.0, max(max(one.new, one.prompt) for one in speeds) or 1.0
    top = _round_up(most)
    lines = "".join(
        f'<path class="{name}" d="{_path(list(of_job), name, end, top)}"/>'
        for name in ("prompt", "new")
        for _, of_job in groupby(speeds, lambda one: one.job)
    )
    borders = "".join(
        f'<line class="border" x1="{_x(one.start, end)}" x2="{_x(one.start, end)}" y1="0" y2="{HEIGHT}"/>'
        for one, before in zip(speeds[1:], speeds, strict=False)
        if one.job != before.job
    )
    picture = _svg("tokens per second over time", _grid() + borders + lines)
    return _framed(
        picture, [rate_words(top), rate_words(top / 2), "0"], ["0 s", seconds_words(end / 2), seconds_words(end)]
    )


def lengths_chart(lengths: Lengths, title: str) -> str:
    """How many rows have which length."""
    top, width = _round_up(max(lengths.counts)), WIDTH / len(lengths.counts)
    bars = "".join(
        f'<rect class="new" x="{place * width + 1:.1f}" y="{HEIGHT - HEIGHT * count / top:.1f}" width="{width - 2:.1f}"'
        f' height="{HEIGHT * count / top:.1f}"><title>{_bin(lengths, place)}: {count:,} rows</title></rect>'
        for place, count in enumerate(lengths.counts)
        if count
    )
    last = lengths.starts[-1] + lengths.width
    ends = [f"{lengths.starts[0]:,}", f"{(lengths.starts[0] + last) // 2:,}", f"{last - (lengths.width == 1):,} tokens"]
    return _framed(_svg(title, _grid() + bars), [f"{top:,.0f}", f"{top / 2:,.5g}", "0"], ends)


def ranks_chart(ranks: list[RankTime]) -> str:
    """A bar a rank for what its time went to, and below it a thin one for what of it was waiting."""
    longest = max(one.seconds for one in ranks) or 1.0
    return f'<div class="ranks">{"".join(_rank(one, longest) for one in ranks)}</div>'


def bars(values: list[tuple[str, int]], kinds: dict[str, str]) -> str:
    """A bar a value, with its number and its share; `kinds`: the class of those that are not plain."""
    total = sum(count for _, count in values) or 1
    rows = (
        f'<tr><th scope="row">{safe(name)}</th><td class="number">{count:,}</td><td class="wide"><span class="bar'
        f' {kinds.get(name, "new")}" style="width:{_percent(count / total)}"></span></td><td class="number">'
        f"{100 * count / total:.1f} %</td></tr>"
        for name, count in values
    )
    return f'<table class="bars">{"".join(rows)}</table>'


def _rank(one: RankTime, longest: float) -> str:
    parts = (("prompt", "prefill", one.prefill), ("new", "decode", one.decode), ("rest", "rest", one.rest))
    spans = "".join(
        f'<span class="bar {kind}" style="width:{_percent(seconds / longest)}" title="{name}"></span>'
        for kind, name, seconds in parts
    )
    words = ", ".join(f"{name} {seconds_words(seconds)}" for _, name, seconds in parts)
    waited = _percent(min(one.waited, one.seconds) / longest)
    return (
        f'<div class="rank"><div class="name">rank {one.rank} <small>{safe(one.device, 80)}</small></div><div'
        f' class="stack">{spans}</div><div class="stack thin"><span class="bar waited" style="width:{waited}"></span></div>'
        f"<small>{words}; {seconds_words(one.waited)} of it waiting for the ring</small></div>"
    )


def _framed(picture: str, heights: list[str], ends: list[str]) -> str:
    """A picture with the words of its axes beside it, which are not stretched with it."""
    up, along = ("".join(f"<span>{safe(one)}</span>" for one in words) for words in (heights, ends))
    return f'<div class="chart"><div class="up">{up}</div>{picture}<div class="along">{along}</div></div>'


def _svg(title: str, content: str) -> str:
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none"'
    return f'<svg {size} role="img"><title>{safe(title)}</title>{content}</svg>'


def _grid() -> str:
    return "".join(f'<line class="grid" x1="0" x2="{WIDTH}" y1="{y}" y2="{y}"/>' for y in (0, HEIGHT // 2, HEIGHT))


def _path(speeds: list[Speed], name: str, end: float, top: float) -> str:
    """Level stretches, one after another."""
    return "M" + "L".join(
        f"{_x(at, end)},{HEIGHT - HEIGHT * getattr(one, name) / top:.1f}"
        for one in speeds
        for at in (one.start, one.stop)
    )


def _x(at: float, end: float) -> str:
    return f"{WIDTH * at / end:.1f}"


def _percent(share: float) -> str:
    return f"{100 * max(min(share, 1.0), 0.0):.2f}%"


def _bin(lengths: Lengths, place: int) -> str:
    start = lengths.starts[place]
    return f"{start:,}" if lengths.width == 1 else f"{start:,} to {start + lengths.width - 1:,}"


def _round_up(value: float) -> float:
    """The least of STEPS times a power of ten that is no smaller."""
    return next(number for number in _round_numbers(value) if number >= value)


def _round_numbers(value: float) -> Iterator[float]:
    power = 10.0 ** (len(f"{int(value)}") - 1) if value >= 1 else 10.0**-30
    while True:
        yield from (step * power for step in STEPS)
        power *= 10
