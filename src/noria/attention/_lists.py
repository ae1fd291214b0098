"""Plans of attention by lists of work: the rows of a microbatch, and the lists that were made of them so far.

Lists are made when the first layer of a shape and window asks for them, and serve all others.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from noria.kernels import forms, lists, placed
from noria.kernels.forms import ListsForm
from noria.kernels.placed import DeviceWork
from noria.kernels.scoring import HeadShape
from noria.kernels.work import Packing, RaggedRows, Work

Name: TypeAlias = tuple[HeadShape, int | None]  # the shape of the heads, and the window
Packed: TypeAlias = Callable[[], Packing]


@dataclass
class Lists:
    """The rows of a microbatch, and what was made of them so far."""

    rows: RaggedRows
    device: torch.device
    made: dict[Name, DeviceWork] = field(default_factory=dict)
    works: dict[Name, Work] = field(default_factory=dict)

    def of(self, heads: HeadShape, window: int | None, packing: Packed) -> DeviceWork:
        """The lists on the device for heads of this shape with this window."""
        name = heads, window
        if name not in self.made:
            self.made[name] = placed.to_device(self.work(name, packing), self.device)
        return self.made[name]

    def work(self, name: Name, packing: Packed) -> Work:
        """The same in host memory."""
        if name not in self.works:
            self.works[name] = lists.make(self.rows, packing())
        return self.works[name]


@dataclass
class _InPlace:
    """Lists of one shape and window: how they are packed, their form, and where they stay."""

    packing: Packing
    form: ListsForm
    lists: DeviceWork


class HeldLists:
    """Lists in memory that stays where it is: launches over them that were recorded once serve all steps that it holds."""

    def __init__(self, device: torch.device):
        self.device = device
        self._held: dict[Name, _InPlace] = {}
        self._plan: Lists | None = None

    def take(self, plan: Lists) -> bool:
        """The lists of this plan take the place of those before, in copies that the host does not wait for.

        False where some had no room: they have other memory from now on, and launches are to be recorded anew.
        """
        self._plan, same = plan, True
        for name, its in self._held.items():
            work = plan.work(name, lambda its=its: its.packing)  # type: ignore[misc]
            form = forms.joined(its.form, work)
            if form != its.form:
                self._held[name], same = self._placed(its.packing, form, work), False
            else:
                source = placed.packed(forms.padded(work, form))
                source = source.pin_memory() if self.device.type == "cuda" else source
                its.lists.packed.copy_(source, non_blocking=True)
        return same

    def of(self, heads: HeadShape, window: int | None, packing: Packed) -> DeviceWork:
        """The lists for heads of this shape with this window; those that nobody asked for before are made."""
        name = heads, window
        if name not in self._held:
            assert self._plan is not None, "no rows were taken"
            work = self._plan.work(name, packing)
            self._held[name] = self._placed(packing(), forms.joined(None, work), work)
        return self._held[name].lists

    def _placed(self, packing: Packing, form: ListsForm, work: Work) -> _InPlace:
        return _InPlace(packing, form, placed.to_device(forms.padded(work, form), self.device))
