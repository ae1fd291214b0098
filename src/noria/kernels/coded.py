"""Keys or values of a layer that are kept in fewer bits, as a kernel takes them that decodes its own tiles. Data alone."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from noria.arrays import Array


@dataclass(frozen=True)
class Coded:
    """An encoded array of a layer's cache: its fields [rows, Hkv, ...] by name, each without gaps."""

    array: Array
    fields: Mapping[str, torch.Tensor]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Rows, Hkv and D: of the numbers."""
        codes = self.fields["codes"]
        return codes.shape[0], codes.shape[1], self.array.row[-1]

    @property
    def form(self) -> str:
        """A kind of encodings/."""
        return self.array.encoding or ""


def zeros(array: Array, rows: int, device: torch.device) -> Coded:
    """So many rows of an encoded array, of nothing yet."""
    heads = (1,) * (len(array.row) == 1)
    fields = {
        name: torch.zeros(rows, *heads, *its.row, dtype=getattr(torch, its.computed("")), device=device)
        for name, its in array.fields.items()
    }
    return Coded(array, fields)
