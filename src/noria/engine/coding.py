"""Codes blocks without loss while they load, on the device, so that fewer of their bytes stream from CPU memory or scratch.

A block goes up parameter by parameter, each coded while the next is on its way, and comes back while the next block goes up.
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
from noria.streams import Event, Streams

LONGER = 1.1  # times as long as it takes to read, that coding may take: a load becomes a tenth longer at most

Leave = Callable[[torch.Tensor, Event], Event]  # queues a copy of bytes of the device behind an event; its own event


class Coder:
    """Codes one block after another, while that is as fast as reading them. `say` is told how fast it was, and where it is not
    so or fails."""

    def __init__(self, streams: Streams, say: Callable[[str], None]):
        self._streams, self._say, self._stopped = streams, say, False
        self._read: tuple[int, float] | None = None  # bytes, and seconds in which they were read
        self._coded, self._left, self._timed, self._seconds = 0, 0, 0, 0.0
        self._leaving: tuple[torch.Tensor, Event] | None = None

    def was_read(self, nbytes: int, seconds: float) -> None:
        """A block was read in so many seconds, while nothing waited for its coding."""
        self._read = nbytes, seconds

    def put(self, block: Block, host: torch.Tensor, leave: Leave) -> Block | None:
        """Codes a plain block [nbytes] in host memory, which is not read any more when this returns; its layout, whose bytes
        `leave` takes. None: it stays plain."""
        made, began = None, time.perf_counter()
        if not self._stopped:
            try:
                made = self._made(block, host)
            except RuntimeError as error:  # of the device: memory too
                self._stop(f"coding them without loss failed ({(str(error).splitlines() or [''])[0][:200]})")
        if made is None:
            return None
        layout, content = made
        self.finish()  # before the memory of what was left before is used again
        self._leaving = content, leave(content, self._streams.event())
        self._count(block.nbytes, layout.nbytes, time.perf_counter() - began)
        return layout

    def finish(self) -> None:
        """Waits until what was coded has come to its place."""
        if self._leaving is not None:
            self._leaving[1].synchronize()
        self._leaving = None

    def close(self) -> None:
        """The same, behind the last block; says what came of it."""
        self.finish()
        if self._coded:
            rates = f", {self._rate / 1e9:.1f} GB/s" if self._timed else ""
            read = f" (read at {self._read[0] / max(self._read[1], 1e-9) / 1e9:.1f} GB/s)" if self._read else ""
            self._say(
                f"weights that stream were coded without loss: {self._coded / 1e9:.1f} GB to {self._left / 1e9:.1f} GB"
                f"{rates}{read}"
            )

    def _made(self, block: Block, host: torch.Tensor) -> tuple[Block, torch.Tensor] | None:
        """The block coded on the device, where its parameters come one after another."""
        content = torch.empty(block.nbytes, dtype=torch.uint8, device=self._streams.device)
        before, coming = self._streams.event(), {}
        for one in block.parameters:
            pair = (content[one.offset : one.offset + one.nbytes], host[one.offset : one.offset + one.nbytes])
            coming[one.name] = self._streams.copy("load", [pair], after=[before])
        try:
            return coded(block, content, lambda parameter: self._streams.wait(coming[parameter.name]))
        finally:
            for event in coming.values():
                event.synchronize()

    @property
    def _rate(self) -> float:
        """Bytes a second of plain blocks that were coded."""
        return self._timed / max(self._seconds, 1e-9)

    def _count(self, nbytes: int, left: int, seconds: float) -> None:
        """The first block is not counted: kernels and the device's memory are new."""
        if self._coded:
            self._timed, self._seconds = self._timed + nbytes, self._seconds + seconds
        self._coded, self._left = self._coded + nbytes, self._left + left
        if self._read is None or not self._timed:
            return
        read = self._read[0] / max(self._read[1], 1e-9)
        if self._rate * LONGER < read:
            self._stop(
                f"coding them without loss takes longer ({self._rate / 1e9:.1f} GB/s) than reading ({read / 1e9:.1f} GB/s)"
            )

    def _stop(self, why: str) -> None:
        self._stopped = True
        self._say(
            f"other weights that stream stay as they are: {why}; noria convert --compress-weights exponent does it once"
        )


def coded(
    block: Block, content: torch.Tensor, wait: Callable[[Parameter], None] = lambda parameter: None
) -> tuple[Block, torch.Tensor] | None:
    """The layout and the bytes of a plain block [nbytes] with what may be coded of it coded, on the device of `content`.

    None where that takes no fewer bytes. What does not come back bit for bit stays plain. `wait`: until a parameter is there.
    """
    numbers, plain = stored(content, block), views(content, block)
    made: dict[str, tuple[Encoded, torch.Tensor]] = {}
    for parameter in block.parameters:
        wait(parameter)
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
    parts = pieces.split([matrix.stored[0] for matrix in matrices], dim=1)
    its = [part.transpose(1, 2) if matrix.transposed else part for part, matrix in zip(parts, matrices, strict=True)]
    fields = encodings.encode_pieces(CODED, matrices, its, {})
    room = encodings.capacity(CODED, matrices, "bfloat16", {})
    lengths = {one.name: fields[one.name].shape[1] for one in room.fields}
    if any(lengths[one.name] > one.shape[0] for one in room.fields):
        return None
    fitted = encodings.fitted(room, lengths)
    return Encoded(CODED, {}, fitted), encodings.packed_pieces(fitted, fields)


def _comes_back(parameter: Parameter, form: Encoded, pieces: torch.Tensor, plain: dict[str, torch.Tensor]) -> bool:
    """Whether the pieces are decoded to the numbers, every bit of them."""
    found = lay_out("", {parameter.name: parameter.wanted}, "bfloat16", {parameter.name: form}).parameters[0]
    fields = found.decoded()
    into = named(torch.empty(fields[-1].offset + fields[-1].nbytes, dtype=torch.uint8, device=pieces.device), fields)
    encodings.decode(found, pieces, into)
    return all(torch.equal(its.view(torch.int16), plain[name].view(torch.int16)) for name, its in into.items())
