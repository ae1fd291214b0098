"""Codes blocks without loss while they load, on the device, so that fewer of their bytes stream from CPU memory.

What was coded is decoded and compared, and stays plain if a bit of it is another. Knows blocks and encodings; no tier, no file.
"""

import time
from collections.abc import Callable

import torch

from noria import encodings
from noria.blocks import Block, Parameter, lay_out
from noria.engine.parameters import named, stored, views
from noria.limits import CODED
from noria.pieces import Encoded

LONGER = 1.1  # times as long as it takes to read, that coding may take: a load becomes a tenth longer at most


class Coder:
    """Codes one block after another, while that is as fast as reading them. `say` is told where it is not, or fails."""

    def __init__(self, device: torch.device, say: Callable[[str], None]):
        self._device, self._say, self._stopped = device, say, False
        self._read: tuple[int, float] | None = None  # bytes, and seconds in which they were read
        self._coded, self._seconds = 0, 0.0

    def was_read(self, nbytes: int, seconds: float) -> None:
        """A block was read in so many seconds, while nothing waited for its coding."""
        self._read = nbytes, seconds

    def put(self, block: Block, host: torch.Tensor, target: torch.Tensor) -> Block:
        """Copies a plain block [nbytes] into memory of as many bytes (or its own), coded if it may be; its layout there."""
        made, began = None, time.perf_counter()
        if not self._stopped:
            try:
                made = coded(block, host.to(self._device))
            except RuntimeError as error:  # of the device: memory too
                self._stop(f"coding them without loss failed ({(str(error).splitlines() or [''])[0][:200]})")
        if made is None:
            if target is not host:
                target.copy_(host)
            return block
        layout, content = made
        target[: layout.nbytes].copy_(content)
        self._count(block.nbytes, time.perf_counter() - began)
        return layout

    def _count(self, nbytes: int, seconds: float) -> None:
        """The first block also builds kernels, and is not counted."""
        if self._coded:
            self._seconds += seconds
        self._coded += nbytes
        counted = self._coded - nbytes
        if self._read is None or not self._seconds:
            return
        read, took = self._read[0] / max(self._read[1], 1e-9), counted / self._seconds
        if took * LONGER < read:
            self._stop(
                f"coding them without loss takes longer ({took / 1e9:.1f} GB/s) than reading ({read / 1e9:.1f} GB/s)"
            )

    def _stop(self, why: str) -> None:
        self._stopped = True
        self._say(
            f"other weights that stream stay as they are: {why}; noria convert --compress-weights exponent does it once"
        )


def coded(block: Block, content: torch.Tensor) -> tuple[Block, torch.Tensor] | None:
    """The layout and the bytes of a plain block [nbytes] with what may be coded of it coded, on the device of `content`.

    None where that takes no fewer bytes. What does not come back bit for bit stays plain.
    """
    numbers, plain = stored(content, block), views(content, block)
    made: dict[str, tuple[Encoded, torch.Tensor]] = {}
    for parameter in block.parameters:
        form = _coded(parameter, numbers[parameter.name]) if parameter.may_be_coded else None
        if form is not None and _comes_back(parameter, *form, {name: plain[name] for name in parameter.computed}):
            made[parameter.name] = form
    held = {parameter.name: one for parameter in block.parameters if (one := parameter.encoded)}
    forms = held | {name: form for name, (form, _) in made.items()}
    layout = lay_out(block.name, {one.name: one.wanted for one in block.parameters}, "bfloat16", forms)
    if layout.nbytes >= block.nbytes:
        return None
    whole = torch.zeros(layout.nbytes, dtype=torch.uint8, device=content.device)
    for name, its in stored(whole, layout).items():
        its.copy_(made[name][1] if name in made else numbers[name])
    return layout, whole


def _coded(parameter: Parameter, numbers: torch.Tensor) -> tuple[Encoded, torch.Tensor] | None:
    """How a plain parameter is coded, and its pieces [P, bytes of a piece]; None if there are too many escapes."""
    matrices = parameter.piece.matrices
    pieces = numbers if parameter.pieces > 1 else numbers.view(1, *parameter.shape[-2:])
    made = []
    for piece in pieces:
        parts = piece.split([matrix.stored[0] for matrix in matrices])
        its = [part.t() if matrix.transposed else part for part, matrix in zip(parts, matrices, strict=True)]
        made.append(encodings.encode(CODED, matrices, its, {}))
    room = encodings.capacity(CODED, matrices, "bfloat16", {})
    lengths = {one.name: max(len(fields[one.name]) for fields in made) for one in room.fields}
    if any(lengths[one.name] > one.shape[0] for one in room.fields):
        return None
    fitted = encodings.fitted(room, lengths)
    return Encoded(CODED, {}, fitted), torch.stack([encodings.packed(fitted, fields) for fields in made])


def _comes_back(parameter: Parameter, form: Encoded, pieces: torch.Tensor, plain: dict[str, torch.Tensor]) -> bool:
    """Whether the pieces are decoded to the numbers, every bit of them."""
    found = lay_out("", {parameter.name: parameter.wanted}, "bfloat16", {parameter.name: form}).parameters[0]
    fields = found.decoded()
    into = named(torch.empty(fields[-1].offset + fields[-1].nbytes, dtype=torch.uint8, device=pieces.device), fields)
    encodings.decode(found, pieces, into)
    return all(torch.equal(its.view(torch.int16), plain[name].view(torch.int16)) for name, its in into.items())
