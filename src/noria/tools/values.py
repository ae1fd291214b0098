"""Sizes, times, shards and shares as people write them. Knows no key: what is wrong is said by the name that is given."""

from typing import Any

from noria.errors import InputError, require
from noria.limits import TIERS
from noria.tools.keys import nearest
from noria.tools.listed import check_listed, is_listed

WHOLE = "1/1"  # the shard that is the whole run


def parse_shard(text: str) -> tuple[int, int]:
    """(i, n) of the shard `i/n`, both from 1. Raises InputError."""
    number, slash, count = (part.strip() for part in text.partition("/"))
    digits = all(part.isascii() and part.isdigit() and len(part) < 10 for part in (number, count))
    require(slash and digits, f"job.shard is {text!r}: it must be i/n, such as 1/4 for the first of four shards")
    i, n = int(number), int(count)
    require(n >= 1, f"job.shard is {text!r}: there must be at least 1 shard")
    require(1 <= i <= n, f"job.shard is {text!r}: shards count from 1, so i/{n} goes from 1/{n} to {n}/{n}")
    return i, n


def shard_rows(shard: str | None, num_rows: int) -> range:
    """The rows of `num_rows` prompts that a shard generates: every n-th, so that prompts added later move no row."""
    i, n = parse_shard(shard or WHOLE)
    return range(i - 1, num_rows, n)


def parse_walltime(value: str | int) -> float:
    """Seconds of `[D-]HH:MM:SS`, `MM:SS` or a number of seconds; infinity of `UNLIMITED`. Raises InputError.

    After days, hours come first: `1-12` is a day and a half.
    """
    text = str(value).strip()
    if text.upper() in ("UNLIMITED", "INFINITE"):
        return float("inf")
    days, dash, clock = text.rpartition("-")
    parts = clock.split(":")
    digits = len(parts) <= 3 and all(
        part.isascii() and part.isdigit() and len(part) < 10 for part in [*parts, days or "0"]
    )
    if dash and digits:
        parts = [*parts, "0", "0"][:3]
    seconds = sum(int(part) * 60**place for place, part in enumerate(reversed(parts))) if digits else 0
    seconds += int(days or 0) * 86_400 if digits else 0
    require(
        seconds > 0 and bool(days) == bool(dash),
        f"job.walltime is {value!r}: it must be HH:MM:SS, such as 03:30:00 or 1-00:00:00, UNLIMITED, or seconds, above 0",
    )
    return seconds


def parse_nbytes(text: str, name: str) -> int:
    """Bytes of a size such as `16GiB`, `500MB`, `1048576`, or `16G` as in SLURM. Raises InputError that names the key."""
    units = (
        {"": 1, "B": 1}
        | {f"{p}{end}": 1024**i for i, p in enumerate("KMGT", 1) for end in ("iB", "")}
        | {f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)}
    )
    digits = text.strip().rstrip("BKMGTi ")
    unit = text.strip()[len(digits) :].strip()
    try:
        nbytes = int(float(digits) * units[unit])
    except (ValueError, KeyError, OverflowError):
        nbytes = -1
    if nbytes < 0:
        raise InputError(f"{name} is {text!r}: it must be a size such as 16GiB or 500MB")
    return nbytes


def parse_pages(text: str) -> int | None:
    """The number of pages that a text such as `1608 pages` gives instead of a size, None for a size."""
    digits, _, word = text.strip().partition(" ")
    return int(digits) if word == "pages" and digits.isascii() and digits.isdigit() and len(digits) < 16 else None


def check_shares(name: str, shares: dict[str, Any], of_blocks: bool) -> None:
    """Raises InputError unless these are shares in % with sum 100, or sizes, by tier.

    `of_blocks`: they may list blocks; else they may give pages.
    """
    require(shares, f'{name} is empty: give shares in %, such as gpu = 60, cpu = 40, or sizes, such as gpu = "40GiB"')
    for tier in shares:
        known = f"unknown tier {tier!r} in {name}{nearest(str(tier), TIERS)}; it is one of {', '.join(TIERS)}"
        require(tier in TIERS, known)
    if of_blocks and is_listed(shares):
        check_listed(shares, name)
        return
    if all(isinstance(share, str) for share in shares.values()):
        for tier, size in shares.items():
            if of_blocks or parse_pages(size) is None:
                parse_nbytes(size, f"{name}.{tier}")
        return
    numbers = all(isinstance(share, int | float) and not isinstance(share, bool) for share in shares.values())
    said = ", ".join(f"{tier} = {share!r}" for tier, share in shares.items())
    require(numbers, f'{name} is {said}: give shares in % or sizes such as "40GiB", not both')
    for tier, share in shares.items():
        require(0 <= share <= 100, f"{name}.{tier} is {share:g}: a share must be 0 .. 100 %")
    total = sum(shares.values())
    require(abs(total - 100) < 0.01, f"{name} is {said}: the shares sum to {total:g} %, they must sum to 100")
