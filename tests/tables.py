"""Random tables for the tests of readers and exports: texts of all characters that files of text stumble over."""

import random

# Quotes, delimiters, line ends of all kinds, what spreadsheets and pandas take for something else.
PIECES = [
    '"', '""', "'", ",", ";", "\t", "\n", "\r", "\r\n", "\\", "\\n", " ", "\u2028", "\x85", "\x0b", "\x1f", "\ufeff",
    "a", "Z", "ß", "東京", "🎉", "é", "0", "1.5", "NA", "null", "None", "true", "b'x'", "=1+1", "#", "[1]", "{}",
]  # fmt: skip


def text(choose: random.Random, longest: int = 6, without: str = "") -> str:
    """A random text, now and then empty, without the characters of `without`."""
    pieces = choose.choices(PIECES, k=choose.randint(0, longest))
    return "".join(letter for letter in "".join(pieces) if letter not in without)


def names(choose: random.Random, most: int = 4) -> list[str]:
    """Names of columns of a user's own: different ones, and none that Noria or another program gives a meaning."""
    found = {"own " + text(choose, 3) for _ in range(choose.randint(0, most))}
    return sorted(found)


def texts(choose: random.Random, most_rows: int = 6, **kind) -> tuple[list[str], list[list[str]]]:
    """A table of texts: its header, which has `prompt` among columns of a user's own, and its rows."""
    header = names(choose)
    header.insert(choose.randint(0, len(header)), "prompt")
    return header, [[text(choose, **kind) for _ in header] for _ in range(choose.randint(0, most_rows))]
