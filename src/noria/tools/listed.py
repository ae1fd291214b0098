"""Blocks of a model as people list them in a text: `layers 0-11 13`, `layers 0 2 head embed`. Knows no model."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from noria.blocks import layer_name
from noria.errors import InputError, require

ENDS = ("embed", "head")
MAX_LAYERS = 100_000


def is_listed(shares: Mapping[str, Any]) -> bool:
    """Whether any of these texts lists blocks, and does not give a size."""
    return any(
        isinstance(text, str) and text.split()[:1] in (["layers"], *([end] for end in ENDS)) for text in shares.values()
    )


def blocks_in(text: str, name: str) -> list[str]:
    """The names of the blocks that a text lists. Raises InputError that names the key."""
    found: list[str] = []
    for word in text.split():
        if word in ENDS:
            found.append(word)
        elif word != "layers":
            found += (layer_name(layer) for layer in _span(word, name))
    twice = next((one for one in found if found.count(one) > 1), None) if len(set(found)) < len(found) else None
    require(twice is None, f"{name} lists {twice} twice")
    return found


def _span(word: str, name: str) -> range:
    first, dash, last = word.partition("-")
    digits = all(part.isascii() and part.isdigit() and len(part) < 7 for part in (first, last if dash else first))
    if not digits or not int(first) <= int(last or first) < MAX_LAYERS:
        raise InputError(f'{name} has {word[:50]!r}: list blocks as in "layers 0-11 13 head embed"')
    return range(int(first), int(last or first) + 1)


def check_listed(shares: Mapping[str, Any], name: str) -> None:
    """Raises InputError unless all tiers list blocks, each of them once."""
    texts = all(isinstance(text, str) and is_listed({tier: text}) for tier, text in shares.items())
    require(texts, f'{name} lists blocks in one tier and not in another: list them in all, as in cpu = "layers 12-15"')
    place: dict[str, str] = {}
    for tier, text in shares.items():
        for block in blocks_in(text, f"{name}.{tier}"):
            require(block not in place, f"{name} lists {block} under {place.get(block)} and {tier}")
            place[block] = tier
    require(place.get("embed") != "disk", f"{name} lists embed under disk: the embedding is in gpu or cpu")


def listed(names: Iterable[str]) -> str:
    """The text that lists these blocks, layers in order."""
    held = set(names)
    layers = sorted(int(name.rpartition("/")[2]) for name in held - set(ENDS))
    words = ["layers", *_spans(layers)] if layers else []
    return " ".join([*words, *(end for end in ENDS if end in held)])


def _spans(layers: list[int]) -> Iterator[str]:
    """`0-11` for numbers that follow each other."""
    start = 0
    for place in range(1, len(layers) + 1):
        if place == len(layers) or layers[place] != layers[place - 1] + 1:
            first, last = layers[start], layers[place - 1]
            yield f"{first}" if first == last else f"{first}-{last}"
            start = place
