"""Matrices that kernels multiply as they are stored: what their codes and scales mean. Data, without Triton.

X matrices, O outputs, I inputs.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

# What a code is: a number in e2m1, two a byte; in e4m3; a whole number less its zero, of 4 bits, two a byte; of 8 bits.
E2M1, E4M3, HALVES, BYTES = 1, 2, 3, 4
# What a scale is: a number; a power of two (e8m0); one in e4m3 times that of its matrix, or divided by it.
NUMBERS, POWERS, MULTIPLIED, DIVIDED = 1, 2, 3, 4
WHOLE_ROW = 1 << 30  # a group that is as wide as any row
LARGEST = {E2M1: 6, E4M3: 416, HALVES: 16, BYTES: 128}  # of what codes stand for
E2M1_NUMBERS = [sign * number for sign in (1.0, -1.0) for number in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)]


@dataclass(frozen=True)
class TileForm:
    """How a tile of codes is decoded: `codes` and `scales` as above; one scale for `group` inputs of `rows` outputs; zeroed:
    whether a group has a zero of its own."""

    codes: int
    scales: int
    group: int
    rows: int = 1
    zeroed: bool = False

    @property
    def served(self) -> bool:
        """Whether kernels decode tiles of it: those have a power of two of inputs, and whole groups, or all of one."""
        return self.group >= 16 and self.group & (self.group - 1) == 0

    @property
    def halved(self) -> bool:
        """Whether a byte has two codes."""
        return self.codes in (E2M1, HALVES)


@dataclass(frozen=True)
class StoredPart:
    """The fields of one matrix in each piece: codes [X, O, bytes of a row], scales [X, rows, groups], zeros of their shape,
    of_matrices [X, 1]. Those that a form does not have are any."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    of_matrices: torch.Tensor

    @property
    def steps(self) -> tuple[int, ...]:
        """From a piece to the next, of each field, in its elements."""
        return tuple(its.stride(0) for its in (self.codes, self.scales, self.zeros, self.of_matrices))


@dataclass(frozen=True)
class StoredMatrices:
    """Matrices [X, O, I] = `shape` in one form, of which parts have some outputs each, one behind the other."""

    form: TileForm
    shape: tuple[int, int, int]
    parts: tuple[StoredPart, ...]

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def kind(self) -> tuple[TileForm, torch.dtype]:
        """What kernels are built for: its form, and the dtype of its scales."""
        return self.form, self.parts[0].scales.dtype

    def plain(self, dtype: torch.dtype) -> torch.Tensor:
        """[X, O, I], decoded by torch: what kernels are compared with."""
        return torch.cat([self._plain(part) for part in self.parts], 1)[..., : self.shape[2]].to(dtype)

    def _plain(self, part: StoredPart) -> torch.Tensor:
        form, codes, outputs = self.form, part.codes, part.codes.shape[1]
        if form.halved:
            codes = torch.stack((codes & 15, codes >> 4), -1).flatten(2)
        group = torch.arange(codes.shape[2], device=codes.device) // form.group
        row = torch.arange(outputs, device=codes.device) // form.rows
        at = (slice(None), row[:, None], group[None, :])
        if form.codes == E2M1:
            numbers = torch.tensor(E2M1_NUMBERS, device=codes.device)[codes.long()]
        elif form.codes == E4M3:
            numbers = codes.view(torch.float8_e4m3fn).float()
        else:
            middle = 8.0 if form.codes == HALVES else 128.0
            numbers = codes.float() - (part.zeros[at].float() if form.zeroed else middle)
        return numbers * self._scales(part)[at]

    def _scales(self, part: StoredPart) -> torch.Tensor:
        """In float32, of groups."""
        scales, whole = part.scales, part.of_matrices[:, :, None]
        if self.form.scales == POWERS:
            return torch.exp2(scales.float() - 127)
        if self.form.scales == MULTIPLIED:
            return scales.view(torch.float8_e4m3fn).float() * whole
        if self.form.scales == DIVIDED:
            return scales.view(torch.float8_e4m3fn).float() / whole
        return scales.float()


def random(
    form: TileForm, of_scales: torch.dtype, shape: tuple[int, int, int], draw: torch.Generator, device: torch.device
) -> StoredMatrices:
    """Matrices of random codes and scales, to try kernels with."""
    pieces, outputs, inputs = shape
    width, groups = -(-inputs // (2 if form.halved else 1)), -(-inputs // form.group)
    of_groups = pieces, -(-outputs // form.rows), groups
    codes = torch.randint(0, 126, (pieces, outputs, width), generator=draw).to(torch.uint8)  # 127 in e4m3 is no number
    zeros = torch.randint(0, 16, of_groups, generator=draw).to(torch.uint8)
    whole = torch.rand(pieces, 1, generator=draw) + 0.5
    if form.scales == NUMBERS:  # so that numbers are 0.1 to 0.3 at most, and no sum is beyond float16
        scales = ((torch.rand(of_groups, generator=draw) * 0.2 + 0.1) / LARGEST[form.codes]).to(of_scales)
    elif form.scales == POWERS:
        most = 125 - math.frexp(LARGEST[form.codes])[1]
        scales = torch.randint(most - 8, most + 2, of_groups, generator=draw).to(torch.uint8)
    else:  # in e4m3 0.016 to 0.12
        scales = torch.randint(8, 32, of_groups, generator=draw).to(torch.uint8)
    part = StoredPart(*(its.to(device) for its in (codes, scales, zeros, whole)))
    return StoredMatrices(form, shape, (part,))


def part_of(fields: Mapping[str, torch.Tensor]) -> StoredPart:
    """Of the fields [X, ...] of one matrix by their names in an encoding."""
    codes = fields["codes"]
    return StoredPart(codes, fields["scales"], fields.get("zeros", codes), fields.get("tensor_scale", codes))
