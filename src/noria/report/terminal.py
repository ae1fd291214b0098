"""A report as lines for a terminal."""

from collections.abc import Iterator, Sequence

from noria.output.schema import Generation
from noria.plan.plan import rate_words
from noria.report.counted import Lengths, Speed
from noria.report.facts import Facts
from noria.report.spent import table_lines
from noria.report.terms import Term
from noria.tools.text import cut, nbytes_words, plural, printable, seconds_words

BAR = 40  # characters of a full bar
ROWS = 20  # of a picture
WIDTH = 110
TEXT = 300  # characters of a generation


def lines_of(facts: Facts) -> Iterator[str]:
    """The whole report, a line each; nothing in it steers a terminal."""
    return (printable(line) for line in _lines(facts))


def _lines(facts: Facts) -> Iterator[str]:
    yield f"{facts.path}: {facts.state}"
    yield from facts.notes
    yield from _section("what ran", (f"{name:<18}{words}" for name, words in [*facts.ran, *facts.plan]))
    title = "planned and measured" + (" (rates assumed, not measured)" if facts.assumed else "")
    yield from _section(title, _terms(facts.terms))
    yield from _section("where the time went", () if facts.spent is None else table_lines(facts.spent))
    yield from _section("where each rank's time went", _ranks(facts))
    yield from _section("over the links", (_link(one.link, one.phase, one.nbytes, one.rate) for one in facts.moved))
    yield from _section("generated tokens/s over time", _speeds(facts.speeds))
    yield from _section("tokens of a prompt", _lengths(facts.prompt_lengths))
    yield from _section("tokens generated for a row", _lengths(facts.lengths))
    total = max(sum(facts.ended.values()), 1)
    ended = (_bar(name, count / total, f"{count:,}") for name, count in facts.ended.items())
    yield from _section("rows by finish reason ('none': stopped half-way)", ended)
    yield from _section(f"errors ({plural(facts.num_groups, 'kind')})" if facts.errors else "", _errors(facts))
    yield from _section(plural(len(facts.generations), "generation"), map(_generation, facts.generations))
    yield from _section("jobs", facts.jobs)


def _section(title: str, lines: Iterator[str] | Sequence[str]) -> Iterator[str]:
    """The lines under their title; nothing where there are none."""
    for number, line in enumerate(lines):
        if not number:
            yield ""
            yield title
        yield f"  {line}"


def _terms(terms: list[Term]) -> Iterator[str]:
    if terms:
        yield f"{'':<24}{'planned':>12}{'measured':>12}"
    for one in terms:
        mark = "  <-" if one.is_off else ""
        yield f"{one.name:<24}{one.planned:>12}{one.measured:>12}{one.change:>9}  {one.note}{mark}".rstrip()


def _ranks(facts: Facts) -> Iterator[str]:
    longest = max((one.seconds for one in facts.ranks), default=0.0) or 1.0
    for one in facts.ranks:
        parts = zip("pd.", (one.prefill, one.decode, one.rest), strict=True)
        bar = "".join(letter * round(BAR * seconds / longest) for letter, seconds in parts)
        words = ", ".join(
            f"{name} {seconds_words(seconds)}"
            for name, seconds in (("prefill", one.prefill), ("decode", one.decode), ("rest", one.rest))
        )
        yield f"{f'rank {one.rank}':<10}{bar:<{BAR + 1}} {words}; {seconds_words(one.waited)} of it waiting for the ring"
    if facts.num_ranks > len(facts.ranks):
        yield f"{plural(facts.num_ranks - len(facts.ranks), 'rank')} more"


def _link(link: str, phase: str, nbytes: float, rate: float) -> str:
    return (
        f"{link:<22}{phase:<9}{nbytes_words(int(nbytes)):>12}{f'{nbytes_words(int(rate))}/s':>14} of the busiest rank"
    )


def _speeds(speeds: list[Speed]) -> Iterator[str]:
    """Equal stretches of time, a line each."""
    if not speeds:
        return
    end, most = speeds[-1].stop, max(one.new for one in speeds) or 1.0
    count = min(ROWS, len(speeds))
    for place in range(count):
        start, stop = end * place / count, end * (place + 1) / count
        new = _mean(speeds, start, stop)
        yield _bar(seconds_words(start), new / most, f"{rate_words(new)} tok/s")


def _mean(speeds: list[Speed], start: float, stop: float) -> float:
    shares = ((max(min(one.stop, stop) - max(one.start, start), 0.0), one.new) for one in speeds)
    return sum(share * new for share, new in shares) / max(stop - start, 1e-9)


def _lengths(lengths: Lengths | None) -> Iterator[str]:
    if lengths is None:
        return
    yield lengths.words
    most = max(lengths.counts)
    for start, count in zip(lengths.starts, lengths.counts, strict=True):
        words = f"{start:,}" if lengths.width == 1 else f"{start:,}-{start + lengths.width - 1:,}"
        yield _bar(words, count / most, f"{count:,}")


def _bar(name: str, share: float, words: str) -> str:
    bar = "#" * max(round(BAR * share), share > 0)
    return f"{name:>13}  {bar:<{BAR}}  {words}"


def _errors(facts: Facts) -> Iterator[str]:
    for one in facts.errors:
        yield f"{plural(one.count, 'row')}:"
        for id, error in one.examples:
            yield f"  {cut(id, 60)}: {cut(error, 2 * WIDTH)}"
    if facts.num_groups > len(facts.errors):
        yield f"{facts.num_groups - len(facts.errors):,} kinds more"


def _generation(one: Generation) -> str:
    name = one.id + f" sample {one.sample}" * (one.sample > 0)
    return f"{cut(name, 60)} ({one.finish_reason}): {cut(one.prompt, WIDTH)!r} -> {cut(one.text, TEXT)!r}"
