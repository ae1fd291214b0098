"""A report as one page of HTML: no script, nothing fetched, and a policy that lets the browser do neither."""

import json
from collections.abc import Iterator
from contextlib import suppress

from noria.errors import InputError
from noria.output.schema import Generation
from noria.report.charts import bars, lengths_chart, ranks_chart, speeds_chart
from noria.report.counted import Lengths
from noria.report.facts import Errors, Facts
from noria.report.markup import block, details, safe, table
from noria.report.measured import LinkBytes
from noria.report.spent import Spent, bubble_words, headline, table_rows
from noria.report.style import STYLE
from noria.report.terms import Term
from noria.tools.text import nbytes_words, plural

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
TEXT, PROMPT, ERROR, COLUMNS, RUN_FILE = 4000, 2000, 1000, 2000, 20_000  # characters
KINDS = {"length": "prompt", "error": "bad", "none": "rest"}


def page_of(facts: Facts) -> str:
    """The whole page. Texts are cut, so that it stays small; whatever is in them is shown, never obeyed."""
    name = safe(facts.path.name)
    sections = "".join(f"<section>{content}</section>" for content in _sections(facts) if content)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
        f'<link rel="icon" href="data:,"><title>{name}</title><style>{STYLE}</style></head><body><header><h1>{name}</h1>'
        f"<p>{safe(facts.state)}</p>{''.join(f'<p>{safe(note, 1000)}</p>' for note in facts.notes)}</header>"
        f"<main>{sections}</main><footer>noria report, {safe(facts.made)}</footer></body></html>\n"
    )


def _sections(facts: Facts) -> Iterator[str]:
    yield f"<h2>What ran</h2>{table(facts.ran)}{_more(facts)}"
    if facts.terms:
        yield f"<h2>Planned and measured</h2>{_terms(facts.terms)}{_assumed(facts.assumed)}"
    if facts.spent is not None:
        yield f"<h2>Where the time went</h2>{_spent(facts.spent)}"
    if facts.ranks:
        yield f"<h2>Where each rank's time went</h2>{_legend(_RANK_KINDS)}{_ranks(facts)}{_links(facts.moved)}"
    if facts.speeds:
        yield f"<h2>Tokens/s over time</h2>{_legend(_SPEED_KINDS)}{speeds_chart(facts.speeds)}"
    yield _lengths("Tokens generated for a row", facts.lengths)
    yield _lengths("Tokens of a prompt", facts.prompt_lengths)
    if facts.ended:
        yield f"<h2>Finish reasons</h2>{bars(list(facts.ended.items()), KINDS)}"
    if facts.errors:
        more = facts.num_groups - len(facts.errors)
        yield (
            f"<h2>Errors</h2>{''.join(map(_errors, facts.errors))}"
            + f"<p>{plural(more, 'kind')} of errors more: noria inspect --json lists them</p>" * (more > 0)
        )
    if facts.generations:
        shown = "".join(_generation(one, number < 3) for number, one in enumerate(facts.generations))
        yield f"<h2>{plural(len(facts.generations), 'generation')} from all over the output</h2>{shown}"


_RANK_KINDS = [
    ("prompt", "prefill"),
    ("new", "decode"),
    ("rest", "rounds without tokens"),
    ("waited", "waiting for the ring"),
]
_SPEED_KINDS = [("new", "generated"), ("prompt", "of prompts")]


def _legend(kinds: list[tuple[str, str]]) -> str:
    return (
        '<p class="legend">'
        + "".join(f'<span><i class="bar {kind}"></i>{words}</span>' for kind, words in kinds)
        + "</p>"
    )


def _more(facts: Facts) -> str:
    found = details("Plan", table(facts.plan)) if facts.plan else ""
    found += details("Run file", block("\n".join(facts.run_file), RUN_FILE)) if facts.run_file else ""
    return found + (details("Jobs", block("\n".join(facts.jobs), RUN_FILE)) if facts.jobs else "")


def _terms(terms: list[Term]) -> str:
    rows = (
        f'<tr><th scope="row">{safe(one.name)}<small>{safe(one.note)}</small></th><td class="number">{safe(one.planned)}</td>'
        f'<td class="number">{safe(one.measured)}</td><td class="number{" off" * one.is_off}">{safe(one.change)}</td>'
        "</tr>"
        for one in terms
    )
    head = '<tr><td></td><th scope="col">planned</th><th scope="col">measured</th><th scope="col">difference</th></tr>'
    return f'<table class="terms">{head}{"".join(rows)}</table>'


def _spent(found: Spent) -> str:
    """The table that the run ended with."""
    (_, *phases), *rows = table_rows(found)
    head = "".join(f'<th scope="col">{safe(phase)}</th>' for phase in phases)
    lines = "".join(f'<tr><th scope="row">{safe(name)}</th>{_numbers(cells)}</tr>' for name, *cells in rows)
    ranks = "Least, mean and most of all ranks. " * (found.num_ranks > 1)
    table = f'<table class="terms"><tr><td></td>{head}</tr>{lines}</table>'
    return f"<p>{safe(headline(found))}</p>{table}<p>{ranks}{safe(bubble_words(found))}</p>"


def _numbers(cells: list[str]) -> str:
    return "".join(f'<td class="number">{safe(cell)}</td>' for cell in cells)


def _assumed(names: list[str]) -> str:
    if not names:
        return ""
    words = ", ".join(names[:40])
    return f"<p><small>The plan took built-in figures for {safe(words, 1000)}; noria probe measures them.</small></p>"


def _ranks(facts: Facts) -> str:
    more = facts.num_ranks - len(facts.ranks)
    return ranks_chart(facts.ranks) + f"<p>{plural(more, 'rank')} more</p>" * (more > 0)


def _links(moved: list[LinkBytes]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{one.link}</th><td>{one.phase}</td><td class="number">{nbytes_words(int(one.nbytes))}</td>'
        f'<td class="number">{nbytes_words(int(one.rate))}/s of the busiest rank</td></tr>'
        for one in moved
    )
    return details("Bytes over the links", f'<table class="terms">{rows}</table>') if rows else ""


def _lengths(title: str, lengths: Lengths | None) -> str:
    if lengths is None:
        return ""
    return f"<h2>{title}</h2><p>{lengths.words}</p>{lengths_chart(lengths, title)}"


def _errors(one: Errors) -> str:
    first = safe(one.examples[0][1], 200)
    rows = "".join(f"<dt><bdi>{safe(id, 200)}</bdi></dt><dd>{block(error, ERROR)}</dd>" for id, error in one.examples)
    return details(f'<b class="bad">{plural(one.count, "row")}</b> <bdi>{first}</bdi>', f"<dl>{rows}</dl>")


def _generation(one: Generation, is_open: bool) -> str:
    name = one.id + f" sample {one.sample}" * (one.sample > 0)
    words = f"{plural(len(one.token_ids), 'token')}, {one.finish_reason}"
    content = block(one.prompt, PROMPT, "prompt") + block(one.text, TEXT) + _columns(one)
    return details(f"<bdi>{safe(name, 200)}</bdi> <small>{words}</small>", content, is_open)


def _columns(one: Generation) -> str:
    """The user's own columns, values as JSON."""
    own = None
    with suppress(InputError, ValueError, RecursionError):
        own = one.columns
    if own is None:
        return block(one.extra, COLUMNS)
    rows = [
        (name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
        for name, value in own.items()
    ]
    return table(rows[:50], COLUMNS) if rows else ""
