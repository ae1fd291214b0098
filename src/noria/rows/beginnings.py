"""Which rows that wait begin alike: a tree of blocks of token ids, and the order in which rows of one beginning follow one
another. Knows neither pages nor slots.

A block is found by its ids and by the block before it: dictionaries hash them and compare them, so that no two beginnings
are ever mixed up.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from noria.limits import RUN_PAGES
from noria.step import NO_STATE, PAGE_TOKENS

BLOCK_TOKENS = RUN_PAGES * PAGE_TOKENS
_BLOCK_NBYTES = 4 * BLOCK_TOKENS
WINDOW = 1024  # rows: one may go ahead of as many that came before it, to follow one that begins like it


@dataclass(eq=False, slots=True)
class BlockPages:
    """Where the keys and values of a block lie in a tier. `lead`: who computes it; None once that is done.

    users: rows in flight that share it and no block behind it; followers: blocks behind it that lie in the tier too; ends:
    rows part behind it, so that a run of pages ends there; state: what is left there, where the family has states.
    """

    page: int
    lead: "Lead | None" = None
    users: int = 0
    followers: int = 0
    ends: bool = False
    state: int = NO_STATE


@dataclass(eq=False, slots=True)
class PromptBlock:
    """BLOCK_TOKENS token ids after those of `parent`. waiting: rows in line that begin with all of them; first_row: the first
    of these, by which all are admitted; places: by tier."""

    parent: "PromptBlock | None"
    ids: bytes
    first_row: int
    waiting: int = 0
    children: dict[bytes, "PromptBlock"] = field(default_factory=dict)
    places: dict[int, BlockPages] = field(default_factory=dict)


@dataclass(eq=False)
class Lead:
    """A row computes blocks for others too. `end`: tokens up to the end of the last of them; `stops`: (tokens, state) where it
    leaves a state for others, if the family has any."""

    tier: int
    blocks: list[PromptBlock]
    end: int
    stops: list[tuple[int, int]] = field(default_factory=list)


class Beginnings:
    """The tree of the blocks of all rows in line, and of those that lie in the cache."""

    def __init__(self) -> None:
        self._root = PromptBlock(None, b"", 0)

    def enter(self, prompt_token_ids: Sequence[int], row: int, count: int = 1) -> list[PromptBlock]:
        """So many rows get in line, of this prompt: its blocks but for the one with its last token, which is always computed."""
        block, blocks = self._root, list[PromptBlock]()
        length = max(len(prompt_token_ids) - 1, 0) // BLOCK_TOKENS
        ids = array("i", prompt_token_ids).tobytes() if length else b""
        for first in range(0, length * _BLOCK_NBYTES, _BLOCK_NBYTES):
            its = ids[first : first + _BLOCK_NBYTES]
            child = block.children.get(its)
            if child is None:
                child = block.children[its] = PromptBlock(block, its, row)
            elif row - child.first_row >= WINDOW:
                child.first_row = row
            child.waiting += count
            blocks.append(child)
            block = child
        return blocks

    def leave(self, blocks: Sequence[PromptBlock]) -> None:
        """A row leaves the line; what nobody needs any more is forgotten."""
        for block in reversed(blocks):
            block.waiting -= 1
            forget(block)


def forget(block: PromptBlock) -> None:
    """Takes a block out of the tree that no row waits for and that lies in no tier."""
    parent = block.parent
    unused = not block.waiting and not block.places and not block.children
    if unused and parent is not None and parent.children.get(block.ids) is block:
        del parent.children[block.ids]


def order_of(blocks: Sequence[PromptBlock], row: int, sample: int) -> tuple[int, ...]:
    """By which rows are admitted: those that share the first block, in the order of the first row that had it; of these those
    that share the next one, and so on; at last in the order of prompts and samples."""
    order: list[int] = []
    for first in [*(block.first_row for block in blocks), row]:
        if not order or order[-1] != first:
            order.append(first)
    return (*order, sample)
