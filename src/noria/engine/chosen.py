"""Experts of streamed layers that are loaded when their router has chosen them: where one group of few tokens is left, these
are fewer bytes than all of a layer.

The rest of the layer sets out ahead as ever; its experts follow into their places in the same weight slot. Knows layouts and
choices, nothing of tiers or steps.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from noria.blocks import Block, Parameter
from noria.kernels.expert_layer import Arriving

Runs = list[tuple[int, int]]  # of bytes in a block: offset and length


class Tail:
    """Whether loads that set out now leave experts behind: where a single group has at most `most` tokens in a step."""

    def __init__(self, most: int):
        self._most = most
        self._tokens: dict[int, int] = {}  # of each group's last step

    def visit(self, group: int, tokens: int) -> None:
        """What a group computes in its step."""
        self._tokens[group] = tokens

    def leaves_experts(self) -> bool:
        at_work = [tokens for tokens in self._tokens.values() if tokens]
        return len(at_work) == 1 and at_work[0] <= self._most


def without_experts(block: Block) -> Runs:
    """Where the bytes of a block lie that are none of an expert; all of it where it has no experts."""
    runs, begin = Runs(), 0
    for parameter in experts_of(block):
        runs.append((begin, parameter.offset - begin))
        begin = parameter.offset + parameter.nbytes
    runs.append((begin, block.nbytes - begin))
    return [run for run in runs if run[1]]


def experts_of(block: Block) -> list[Parameter]:
    """The parameters in several pieces, an expert each."""
    return [parameter for parameter in block.parameters if parameter.pieces > 1]


def runs_of(parameter: Parameter, pieces: Iterable[int]) -> Runs:
    """Where these pieces lie, in ascending order; those that follow one another are one run."""
    runs = Runs()
    for first, nbytes in map(parameter.place, pieces):
        if runs and sum(runs[-1]) == first:
            first, nbytes = runs[-1][0], runs.pop()[1] + nbytes
        runs.append((first, nbytes))
    return runs


def split(runs: Runs, nbytes: int) -> tuple[Runs, Runs]:
    """The first so many bytes of these runs, and those behind them."""
    before, behind = Runs(), Runs()
    for first, length in runs:
        taken = min(nbytes, length)
        nbytes -= taken
        before.append((first, taken))
        behind.append((first + taken, length - taken))
    return [run for run in before if run[1]], [run for run in behind if run[1]]


class WithArriving(Mapping[str, Any]):
    """The parameters of a layer, of which some are Arriving."""

    def __init__(self, given: Mapping[str, Any], bring: Mapping[str, Callable[[torch.Tensor], None]]):
        self._given, self._bring = given, bring

    def __getitem__(self, name: str) -> Any:
        there = self._given[name]
        return Arriving(there, self._bring[name]) if name in self._bring else there

    def __contains__(self, name: object) -> bool:
        return name in self._given

    def __iter__(self) -> Iterator[str]:
        return iter(self._given)

    def __len__(self) -> int:
        return len(self._given)
