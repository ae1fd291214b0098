"""Text that leaves the program: what HDF5 can store, what JSON has, what a terminal may show.

Knows no file and no terminal.
"""

import functools
import json
import math
import re

REPLACEMENT = "\ufffd"

_UNSTORABLE = re.compile("[\0\ud800-\udfff]")
# Control characters; what changes the direction of text or is not seen (joiners stay: scripts and emoji need them).
_STEERING = (
    "\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f"
)
_UNPRINTABLE = re.compile(f"[\0-\x1f{_STEERING}]")
_UNREADABLE = re.compile(f"[\0-\x08\x0b-\x1f{_STEERING}]")


def storable(text: str) -> str:
    """`text` as an HDF5 string can hold it: NUL and lone surrogates become U+FFFD."""
    return _UNSTORABLE.sub(REPLACEMENT, text)


def json_text(value: object, ensure_ascii: bool = False) -> str:
    """The value as JSON, in any script unless `ensure_ascii`; numbers that JSON lacks (infinity, NaN) are null."""
    try:
        return json.dumps(value, ensure_ascii=ensure_ascii, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), ensure_ascii=ensure_ascii)


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def printable(text: str) -> str:
    """`text` on one line; what steers a terminal (control characters, changes of direction) is written as escapes."""
    return _UNPRINTABLE.sub(_escape, text)


def readable(text: str) -> str:
    """The same on as many lines as it has: line ends and tabs stay."""
    return _UNREADABLE.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()


def one_line(text: str) -> str:
    """`text` with each stretch of whitespace as one space."""
    return " ".join(text.split())


def cut(text: str, width: int) -> str:
    """`text`, and of one that has more characters so many and `...`."""
    return text if len(text) <= width else f"{text[:width]}..."


def plural(count: int, noun: str) -> str:
    """`1 row`, `1,234 rows`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def nbytes_words(nbytes: int) -> str:
    """`512 B`, `1.2 MiB`; from 2 TiB on in TiB."""
    for unit, size, least in (("TiB", 2**40, 2), ("GiB", 2**30, 1), ("MiB", 2**20, 1), ("KiB", 2**10, 1)):
        if nbytes >= least * size:
            return f"{nbytes / size:.1f} {unit}"
    return f"{nbytes:.0f} B"


def seconds_words(seconds: float) -> str:
    """`0 s`, `0.000 ms`, `61.3 ms`, `2.31 s`, `12.0 min`, `3.5 h`."""
    if 0 < seconds < 1e-6:
        return "0.000 ms"
    if 0 < seconds < 0.9995:  # what is more has four digits as ms
        return f"{1000 * seconds:.3g} ms"
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.3g} s"


def short(value: object) -> str:
    """A wrong value as an error message shows it."""
    text = repr(value[:50] if isinstance(value, str | list) else value)
    return text if len(text) <= 60 else text[:57] + "..."


@functools.cache
def byte_letters() -> dict[str, int]:
    """GPT-2's letters of bytes: printable ones of Latin-1 stand for themselves, the others for letters from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + place): byte for place, byte in enumerate(others)}
