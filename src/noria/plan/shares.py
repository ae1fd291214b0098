"""Which tier each block lives in: shares in % or budgets in bytes, spread evenly over a rank's blocks. Pure arithmetic."""

from collections.abc import Mapping, Sequence
from typing import Any

from noria.blocks import layer_name
from noria.errors import InputError, require
from noria.limits import TIERS
from noria.tools.listed import ENDS, blocks_in, is_listed, listed
from noria.tools.text import plural
from noria.tools.values import parse_nbytes, parse_pages


class Uncovered(ValueError):
    """Budgets do not hold all blocks: `missing` bytes of `total`."""

    def __init__(self, missing: int, total: int):
        super().__init__(f"{missing} of {total} bytes")
        self.missing, self.total = missing, total


def is_budget(shares: Mapping[str, Any]) -> bool:
    """Whether the key gives sizes, not shares in % nor lists of blocks."""
    return any(isinstance(share, str) for share in shares.values()) and not is_listed(shares)


def by_share(sizes: Sequence[int], shares: Mapping[str, float]) -> list[str]:
    """The tier of each block, whose bytes are `sizes` in the order of visits.

    Error diffusion: each block goes to the tier that is furthest behind its share, so that every tier has its share to
    within a block, at every point of the way.
    """
    total = sum(shares.values())
    behind, tiers = dict.fromkeys(TIERS, 0.0), []
    for size in sizes:
        for tier in TIERS:
            behind[tier] += size * shares.get(tier, 0) / total
        chosen = max((tier for tier in TIERS if shares.get(tier, 0)), key=behind.__getitem__)
        behind[chosen] -= size
        tiers.append(chosen)
    return tiers


def by_budget(sizes: Sequence[int], budgets: Mapping[str, int]) -> list[str]:
    """The tier of each block: budgets are filled in the order gpu, cpu, disk, and what lies in each is spread evenly.

    No budget is exceeded. Raises Uncovered if they do not hold all blocks.
    """
    left, filled, rest = {tier: budgets.get(tier, 0) for tier in TIERS}, [], 0
    for size in sizes:
        tier = next((tier for tier in TIERS if size <= left[tier]), None)
        if tier is None:
            rest += size
            continue
        left[tier] -= size
        filled.append(tier)
    if rest:
        raise Uncovered(rest, sum(sizes))
    return _spread(sizes, filled)


def by_list(names: Sequence[str], texts: Mapping[str, str]) -> dict[str, str]:
    """The tier of each of these blocks, which `texts` list by tier. Raises InputError for those that they leave out."""
    place = {block: tier for tier, text in texts.items() for block in blocks_in(text, f"placement.weights.{tier}")}
    left = [name for name in names if name not in place]
    require(not left, f"placement.weights lists blocks, but not {listed(left)}: list each block of the model once")
    return {name: place[name] for name in names}


def check_list(weights: Mapping[str, Any] | None, num_layers: int) -> None:
    """Raises InputError where `placement.weights` lists layers that the model does not have."""
    if weights is None or not is_listed(weights):
        return
    names = [block for tier, text in weights.items() for block in blocks_in(text, f"placement.weights.{tier}")]
    known = {*ENDS, *map(layer_name, range(num_layers))}
    if wrong := [name for name in names if name not in known]:
        has = f"{plural(num_layers, 'layer')}, 0 to {num_layers - 1}"
        raise InputError(f"placement.weights lists {listed(wrong)}, but the model has {has}")


def budgets_of(shares: Mapping[str, str], name: str) -> dict[str, int]:
    """Bytes of each tier."""
    return {tier: parse_nbytes(size, f"{name}.{tier}") for tier, size in shares.items()}


def amounts(shares: Mapping[str, Any], name: str) -> Mapping[str, float]:
    """Shares in %, bytes or pages, as numbers."""
    if not is_budget(shares):
        return shares
    pages = {tier: parse_pages(text) for tier, text in shares.items()}
    return {
        tier: parse_nbytes(shares[tier], f"{name}.{tier}") if count is None else count for tier, count in pages.items()
    }


def _spread(sizes: Sequence[int], filled: Sequence[str]) -> list[str]:
    """A filling with the same bytes in each tier, evenly mixed; the filling itself where blocks are too unlike for that."""
    held = {tier: sum(size for size, at in zip(sizes, filled, strict=True) if at == tier) for tier in TIERS}
    behind, left, tiers = dict.fromkeys(TIERS, 0.0), dict(held), []
    for size in sizes:
        for tier in TIERS:
            behind[tier] += size * held[tier] / sum(sizes)
        fitting = [tier for tier in TIERS if size <= left[tier]]
        if not fitting:
            return list(filled)
        chosen = max(fitting, key=behind.__getitem__)
        behind[chosen] -= size
        left[chosen] -= size
        tiers.append(chosen)
    return tiers
