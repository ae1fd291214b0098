"""How numbers are stored, an encoding a file; what turns stored pieces into what a model computes with, and back.

A file has, for one matrix of numbers (`shape` is [outputs, inputs], or that of a vector):

    fields(shape, dtype, settings) -> {name: (shape, dtype)}    the fields that hold it, at most: its capacity
    VARIABLE                        names of the fields that may be shorter along their first dimension
    DEFAULTS                        settings that are not said
    encode(numbers, settings) -> {name: tensor}                 on their device; variable fields as long as they need
    BY_PARTS                        if it has it and it is True: `encode` takes a third argument, like `map`, which it gives parts
                                    of its work that threads may do at once
    rows(settings) -> int           if it has it: so many outputs (or a multiple) are encoded like a matrix of their own, and
                                    fields are those of all, one after another; 0: there are none
    decode(fields, settings, into)  fields [P, ...] of P pieces into [P, outputs, inputs], on any device; whatever they
                                    hold, it stays within its fields and `into`
    quick(numbers, settings) -> {name: tensor}                  if it has it: encode without a search, a wait for the device or
                                    a refusal, for a cache; what is no finite number makes its group none
    check(fields, shape, settings)  raises InputError for fields [P, ...] that encode does not make
    most(fields, settings) -> float                             if it has it: no number of such fields is larger
    form(settings) -> TileForm          if it has it: how kernels that multiply decode tiles of it (kernels/stored.py)
    KERNEL                          if it has one: the file of kernels/ whose `decode` gives the same bits on CUDA
    ENCODER                         if it has one: the file of kernels/ whose `encode` of P matrices [P, outputs, inputs] gives
                                    the same bytes on CUDA: fields [P, ...], of variable ones as many as the longest has

`dtype` is that of the numbers where they are plain, `settings` what a file says of the encoding beside it (a group's
size). Knows layouts and tensors; no file, no block's place.
"""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor
from types import ModuleType
from typing import Any

import torch

from noria import kinds
from noria.blocks import Block, Parameter, round_up
from noria.encodings import _cached, _kernels
from noria.errors import InputError, require
from noria.kernels.stored import StoredMatrices, part_of
from noria.pieces import VIEW_ALIGNMENT, Field, Matrix, Piece

Fields = dict[str, torch.Tensor]
write_rows, decode_pages, without_cache_kernels = _cached.write, _cached.decode, _cached.without_kernels
ENCODED_NUMBERS = 2**21  # that a thread encodes at a time
LARGEST = torch.finfo(torch.float32).max


def capacity(encoding: str, matrices: Sequence[Matrix], dtype: str, settings: Mapping[str, Any]) -> Piece:
    """A piece with room for whatever numbers. Raises InputError for an encoding or settings that do not exist."""
    kind, layout = kinds.load("encodings", encoding), Piece(0, (), tuple(matrices))
    wanted = [
        Field(layout.prefix(number) + name, tuple(shape), its_dtype)
        for number, matrix in enumerate(matrices)
        for name, (shape, its_dtype) in kind.fields(matrix.stored, dtype, settings).items()
    ]
    return _laid_out(wanted, matrices)


def fitted(piece: Piece, lengths: Mapping[str, int]) -> Piece:
    """The piece with fields of these lengths along their first dimension."""
    fields = [Field(one.name, (lengths.get(one.name, one.shape[0]), *one.shape[1:]), one.dtype) for one in piece.fields]
    return _laid_out(fields, piece.matrices)


def _laid_out(fields: Sequence[Field], matrices: Sequence[Matrix]) -> Piece:
    laid: list[Field] = []
    offset = 0
    for one in fields:
        laid.append(Field(one.name, one.shape, one.dtype, offset))
        offset += round_up(one.nbytes, VIEW_ALIGNMENT)
    return Piece(offset, tuple(laid), tuple(matrices))


def encode(
    encoding: str,
    matrices: Sequence[Matrix],
    numbers: Sequence[torch.Tensor],
    settings: Mapping[str, Any],
    pool: Executor | None = None,
) -> Fields:
    """The fields of a piece by name, of the numbers [outputs, inputs] of each of its matrices; by threads where there is a
    pool."""
    kind, layout = kinds.load("encodings", encoding), Piece(0, (), tuple(matrices))
    found: Fields = {}
    for number, (matrix, its) in enumerate(zip(matrices, numbers, strict=True)):
        stored = its.t() if matrix.transposed else its
        found |= {layout.prefix(number) + name: value for name, value in _encoded(kind, stored, settings, pool).items()}
    return found


def encode_pieces(
    encoding: str, matrices: Sequence[Matrix], numbers: Sequence[torch.Tensor], settings: Mapping[str, Any]
) -> Fields:
    """The fields [P, ...] of P pieces by name, of the numbers [P, outputs, inputs] of each of their matrices, on their device;
    variable ones are as long as the longest, zeros behind the others. By a kernel on a CUDA device, where there is one."""
    layout, found = Piece(0, (), tuple(matrices)), Fields()
    for number, (matrix, its) in enumerate(zip(matrices, numbers, strict=True)):
        its_encode, _ = _kernels.encoder(encoding, its.device)
        fields = its_encode(its.transpose(1, 2) if matrix.transposed else its, settings)
        found |= {layout.prefix(number) + name: value for name, value in fields.items()}
    return found


def _encoded(kind: ModuleType, numbers: torch.Tensor, settings: Mapping[str, Any], pool: Executor | None) -> Fields:
    """The fields of a matrix, whose outputs are encoded some by some where that changes nothing."""
    if pool is not None and getattr(kind, "BY_PARTS", False):
        return kind.encode(numbers, settings, pool.map)
    rows: int = kind.rows(settings) if hasattr(kind, "rows") else 0
    if pool is None or not rows or not numbers.numel():
        return kind.encode(numbers, settings)
    some = numbers.split(max(ENCODED_NUMBERS // numbers.shape[1] // rows, 1) * rows)
    made = list(pool.map(lambda its: kind.encode(its, settings), some))
    return {name: torch.cat([its[name] for its in made]) for name in made[0]}


def packed(piece: Piece, fields: Fields) -> torch.Tensor:
    """The bytes of a piece on its fields' device: uint8 [nbytes], zeros where they leave room."""
    return packed_pieces(piece, {name: its[None] for name, its in fields.items()})[0]


def packed_pieces(piece: Piece, fields: Fields) -> torch.Tensor:
    """The same of P pieces, whose fields are [P, ...]: uint8 [P, nbytes]."""
    some = next(iter(fields.values()))
    whole = torch.zeros(len(some), piece.nbytes, dtype=torch.uint8, device=some.device)
    for one in piece.fields:
        its, room = fields[one.name][0], one.shape
        right = its.dtype == getattr(torch, one.dtype) and its.shape[1:] == room[1:] and len(its) <= room[0]
        assert right, f"field {one.name} is {its.dtype} {list(its.shape)}, it is {one.dtype} {list(room)} at most"
        content = fields[one.name].reshape(len(some), -1).view(torch.uint8)
        whole[:, one.offset : one.offset + content.shape[1]] = content
    return whole


def decode(
    parameter: Parameter,
    pieces: torch.Tensor,
    into: Mapping[str, torch.Tensor],
    named: torch.Tensor | None = None,
) -> None:
    """Decodes pieces [P, bytes of a piece] into the tensors that the parameter is computed as, on their device.

    `into` holds tensors [P, outputs, inputs], or without P where the parameter has none, by the names of
    parameter.computed. On a CUDA device a kernel does it where there is one, with the same bits. named: int32 on the device,
    which of the pieces each of `into` is, -1 for none; if not given, all in turn.
    """
    row = dict.fromkeys(into, 0)
    for number, matrix in enumerate(parameter.piece.matrices):
        name = matrix.within(parameter.name)
        whole = into[name] if len(parameter.shape) == 3 else into[name][None]
        target = whole.narrow(1, row[name], matrix.shape[0])
        fields = fields_of(parameter.piece, number, pieces)
        stored = target.transpose(1, 2) if matrix.transposed else target
        decode_matrices(parameter.encoding, fields, parameter.settings, stored, named)
        row[name] += matrix.shape[0]


def decode_matrices(
    encoding: str,
    fields: Fields,
    settings: Mapping[str, Any],
    into: torch.Tensor,
    named: torch.Tensor | None = None,
) -> None:
    """Decodes the fields [P, ...] of P matrices into [P, outputs, inputs], by a kernel where there is one; or those named."""
    its_decode, _ = _kernels.decoder(encoding, into.device, into.dtype)
    if named is None:
        its_decode(fields, settings, into)
    elif its_decode is not kinds.load("encodings", encoding).decode:  # kernels look pieces up in lists themselves
        its_decode(fields, settings, into, named)
    else:
        its_decode({name: its[named.clamp(min=0)] for name, its in fields.items()}, settings, into)


def without_kernel(names: Iterable[str], device: torch.device, dtype: torch.dtype) -> list[str]:
    """Builds the kernels of these encodings for this device. A line for each that torch decodes, or codes, though it has one."""
    found = {}
    for name in sorted({*names}):
        found[f"{name} is decoded"] = _kernels.decoder(name, device, dtype)[1]
        found[f"{name} is coded"] = _kernels.encoder(name, device)[1]
    return [f"{what} by torch, slower than by its kernel: {why}" for what, why in found.items() if why]


def fields_of(piece: Piece, number: int, pieces: torch.Tensor) -> Fields:
    """The fields [P, ...] of one matrix, as views into pieces [P, bytes of a piece]."""
    found = {}
    for name, one in piece.fields_of(number).items():
        its = pieces[:, one.offset : one.offset + one.nbytes].view(getattr(torch, one.dtype))
        found[name] = its.unflatten(1, one.shape)
    return found


def in_tiles(parameter: Parameter, pieces: torch.Tensor, name: str) -> StoredMatrices | None:
    """The tensor of this name that a parameter is computed as, of pieces [P, bytes of a piece], for kernels that decode their
    own tiles; none where they cannot."""
    kind, matrices = kinds.load("encodings", parameter.encoding), parameter.piece.matrices
    form = kind.form(parameter.settings) if hasattr(kind, "form") else None
    its = [n for n, matrix in enumerate(matrices) if matrix.within(parameter.name) == name]
    if form is None or not form.served or any(matrices[n].transposed for n in its):
        return None
    outputs, inputs = sum(matrices[n].shape[0] for n in its), matrices[its[0]].shape[1]
    parts = tuple(part_of(fields_of(parameter.piece, n, pieces)) for n in its)
    return StoredMatrices(form, (len(pieces), outputs, inputs), parts)


def check_block(block: Block, content: torch.Tensor, path: str) -> None:
    """Raises InputError, naming file and parameter, for bytes of a block [nbytes] that its encodings do not make."""
    for parameter in block.fielded:
        pieces = content[parameter.offset : parameter.offset + parameter.nbytes].view(parameter.pieces, -1)
        try:
            check(parameter, pieces)
        except InputError as error:
            raise InputError(
                f"{path}: '{block.name}/{parameter.name}', encoded as {parameter.encoding}: {error}; convert the model again"
            ) from error


def check(parameter: Parameter, pieces: torch.Tensor) -> None:
    """Raises InputError for pieces [P, bytes of a piece] that the parameter's encoding does not make."""
    kind = kinds.load("encodings", parameter.encoding)
    for number, matrix in enumerate(parameter.piece.matrices):
        fields = fields_of(parameter.piece, number, pieces)
        kind.check(fields, matrix.stored, parameter.settings)
        if hasattr(kind, "most") and not kind.most(fields, parameter.settings) <= LARGEST:
            _check_finite(kind, fields, matrix.stored, parameter.settings)


def _check_finite(kind: ModuleType, fields: Fields, shape: tuple[int, ...], settings: Mapping[str, Any]) -> None:
    """Raises InputError where a number of fields [P, ...] is beyond float32: what has a scale so large is decoded to see."""
    for piece in range(len(fields["codes"])):
        into = torch.empty(1, *shape, device=fields["codes"].device)
        kind.decode({name: its[piece : piece + 1] for name, its in fields.items()}, settings, into)
        wrong = int((~torch.isfinite(into)).sum())
        require(
            not wrong,
            f"{wrong} of its numbers are beyond float32, {LARGEST:.3g}: codes times scales as large as"
            f" {kind.most(fields, settings):.3g} at most",
        )


def check_fields(encoding: str, piece: Piece, dtype: str, settings: Mapping[str, Any]) -> None:
    """Raises InputError for fields or settings that a file says and the encoding does not have so."""
    kind, most = kinds.load("encodings", encoding), capacity(encoding, piece.matrices, dtype, settings)
    room, told = {one.name: one for one in most.fields}, {one.name: one for one in piece.fields}
    if len(told) != len(piece.fields) or told.keys() != room.keys():
        has, should = (", ".join(one.name for one in fields[:8]) for fields in (piece.fields, most.fields))
        raise InputError(f"it has the fields {has or 'none'}, {encoding} has {should}" + ", ..." * (len(room) > 8))
    end = 0
    for one in sorted(piece.fields, key=lambda one: one.offset):
        wanted, shorter = room[one.name], one.name.rpartition(".")[2] in kind.VARIABLE
        length = wanted.shape[0] if not shorter else min(one.shape[0] if one.shape else -1, wanted.shape[0])
        if one.dtype != wanted.dtype or one.shape != (length, *wanted.shape[1:]):
            most_words = " at most" if shorter else ""
            raise InputError(
                f"its field {one.name} is {one.dtype} {list(one.shape)}, {encoding} has it as"
                f" {wanted.dtype} {list(wanted.shape)}{most_words}"
            )
        if one.offset % VIEW_ALIGNMENT or one.offset < end or one.offset + one.nbytes > piece.nbytes:
            raise InputError(
                f"its field {one.name} lies from byte {one.offset} to {one.offset + one.nbytes} of a piece"
                f" of {piece.nbytes}, where the field before it ends at {end}: fields begin at multiples of"
                f" {VIEW_ALIGNMENT}, one after another"
            )
        end = one.offset + one.nbytes
