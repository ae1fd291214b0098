"""Draws some rounds of a trace (noria run --trace FILE.json) as an SVG picture.

python jobs/bench/trace_picture.py trace.json trace.svg --first 4 --rounds 2
"""

import argparse
import json
from collections import defaultdict
from html import escape
from pathlib import Path

WIDTH, LEFT, ROW, GAP, TOP, BOTTOM = 1200, 130, 18, 4, 34, 46
TRACKS = {
    "steps": "#9aa5b1",
    "compute": None,  # by group
    "load": "#2f7d4f",
    "store": "#a3507a",
    "send": "#c77f1a",
    "receive": "#e0b252",
    "waits": "#d9d9d9",
}
GROUPS = ["#2a62b5", "#79a9e6", "#4a3f9f", "#9d94de"]


def read(path: Path) -> tuple[dict[int, str], list[dict]]:
    """The names of the ranks, and all spans."""
    events = json.loads(path.read_text())["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    return names, [event for event in events if event["ph"] == "X"]


def window(spans: list[dict], first: int, rounds: int) -> tuple[float, float]:
    """From when the first of the rounds is computed anywhere to the end of the last one, in microseconds."""
    inside = [s for s in spans if s["cat"] == "compute" and first <= s["args"]["round"] < first + rounds]
    if not inside:
        raise SystemExit(f"the trace has no rounds {first} to {first + rounds - 1}")
    return min(s["ts"] for s in inside), max(s["ts"] + s["dur"] for s in inside)


def draw(names: dict[int, str], spans: list[dict], begin: float, end: float) -> str:
    """The picture: for each rank a row for each of its tracks."""
    rows, pieces, y = defaultdict(list), [], TOP
    for span in spans:
        if span["ts"] < end and span["ts"] + span["dur"] > begin:
            rows[span["pid"], span["cat"], span["tid"]].append(span)
    scale = (WIDTH - LEFT - 10) / (end - begin)
    for rank, name in sorted(names.items()):
        pieces.append(f'<text x="4" y="{y + 12}" font-weight="bold">{escape(name)}</text>')
        y += ROW
        for track in TRACKS:
            for number, key in enumerate(sorted(key for key in rows if key[:2] == (rank, track))):
                label = track + f" {number + 1}" * (number > 0)
                pieces.append(f'<text x="14" y="{y + 13}">{label}</text>')
                pieces += [bar(span, begin, end, scale, y) for span in rows[key]]
                y += ROW + GAP
        y += 2 * GAP
    pieces += axis(end - begin, scale, y)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y + BOTTOM}" font-family="sans-serif"'
        f' font-size="12">\n<rect width="{WIDTH}" height="{y + BOTTOM}" fill="#ffffff"/>\n{legend()}\n'
    )
    return head + "\n".join(pieces) + "\n</svg>\n"


def bar(span: dict, begin: float, end: float, scale: float, y: int) -> str:
    """A span as a box, with its words where they fit."""
    left, right = max(span["ts"], begin), min(span["ts"] + span["dur"], end)
    x, width, args = LEFT + (left - begin) * scale, max((right - left) * scale, 0.4), span["args"]
    colour = TRACKS[span["cat"]] or GROUPS[args["group"] % len(GROUPS)]
    box = f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="{ROW}" fill="{colour}"'
    text, light = words(span), span["cat"] in ("compute", "load", "store")
    told = f"><title>{escape(text)} {span['dur']:.0f} us</title></rect>"
    if 6.6 * len(text) > width:
        return box + ' stroke="#ffffff" stroke-width="0.4"' + told
    place = f'<text x="{x + 2:.1f}" y="{y + 13}" fill="{"#ffffff" if light else "#222222"}">{escape(text)}</text>'
    return box + ' stroke="#ffffff" stroke-width="0.6"' + told + place


def words(span: dict) -> str:
    args = span["args"]
    if span["cat"] == "compute":
        return f"{args['layer']}" if "layer" in args else span["name"]
    if span["cat"] == "steps":
        return f"{span['name']}, round {args['round']}: {args['tokens']} tokens"
    return span["name"].removeprefix("layers/00")


def legend() -> str:
    pieces, x = [], LEFT
    kinds = [(f"compute, group {number}", colour) for number, colour in enumerate(GROUPS[:2])]
    for name, colour in kinds + [(name, colour) for name, colour in TRACKS.items() if colour]:
        pieces.append(
            f'<rect x="{x}" y="8" width="12" height="12" fill="{colour}"/><text x="{x + 16}" y="18">{name}</text>'
        )
        x += 34 + 7 * len(name)
    return "".join(pieces)


def axis(length: float, scale: float, y: int) -> list[str]:
    """Milliseconds below."""
    step = next(s for s in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 1e4, 1e5) if length / 1e3 / s < 14)
    pieces, at = [], 0.0
    while at * 1e3 <= length:
        x = LEFT + at * 1e3 * scale
        pieces.append(
            f'<path d="M{x:.1f} {TOP}V{y}" stroke="#00000022"/><text x="{x - 8:.1f}" y="{y + 14}">{at:g}</text>'
        )
        at = round(at + step, 3)
    return [*pieces, f'<text x="{LEFT}" y="{y + 32}">milliseconds; a number in compute is a layer</text>']


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--first", type=int, default=4, help="the first round drawn")
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    names, spans = read(arguments.trace)
    arguments.picture.write_text(draw(names, spans, *window(spans, arguments.first, arguments.rounds)))


if __name__ == "__main__":
    main()
