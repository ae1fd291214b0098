"""Encodes parameters on their way into a checkpoint, and checks those of one, a piece at a time.

Knows tensors' files and encodings; which parameters are encoded, and how, is the caller's to say.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from math import inf
from typing import Any, TypeAlias

import torch

from noria import encodings, kinds
from noria.blocks import Block, Parameter, lay_out
from noria.checkpoint.checkpoint import Checkpoint
from noria.checkpoint.sources import Plan, TensorSource
from noria.checkpoint.tensor_files import Reader
from noria.errors import InputError, require
from noria.limits import CODED
from noria.pieces import Encoded, Matrix
from noria.tools.container import read_full

Form: TypeAlias = tuple[str, Mapping[str, Any]]  # an encoding and its settings
Forms: TypeAlias = Mapping[str, Form]  # by a parameter's name
Choose: TypeAlias = Callable[[str, Parameter], Form | None]  # of a parameter in a block; None: it stays plain


def chosen_by_name(forms: Forms) -> Choose:
    """Every parameter of these names, whatever its block."""
    return lambda block, parameter: forms.get(parameter.name)


class PieceEncoder:
    """Lays out and encodes the parameters for which `choose` has an encoding, made of the tensors in `plan`.

    An embedding stays plain, and so does the head that is one.
    """

    def __init__(self, plan: Plan, choose: Choose, tied: bool, reader: Reader):
        self._plan, self._choose, self._tied, self._reader = plan, choose, tied, reader
        self._plain: dict[
            tuple[str, str], Sequence[Matrix]
        ] = {}  # how the matrices of a parameter lie where it is plain

    def lay_out(self, block: Block, dtype: str) -> Block:
        """The layout of a plain block with its encoded parameters. One whose numbers find no room there stays plain."""
        found: dict[str, Encoded] = {}
        for parameter in block.parameters:
            gathered = block.name == "embed" or (self._tied and parameter.name == "lm_head")
            chosen = None if gathered else self._choose(block.name, parameter)
            if chosen is not None:
                form = self._form(block, parameter, dtype, *chosen)
                found |= {} if form is None else {parameter.name: form}
        wanted = {parameter.name: parameter.wanted for parameter in block.parameters}
        return lay_out(block.name, wanted, dtype, found) if found else block

    def _form(
        self, block: Block, parameter: Parameter, dtype: str, encoding: str, said: Mapping[str, Any]
    ) -> Encoded | None:
        kind = kinds.load("encodings", encoding)
        settings = kind.DEFAULTS | said
        self._plain[block.name, parameter.name] = parameter.piece.matrices
        try:
            piece = encodings.capacity(encoding, self._matrices(block, parameter), dtype, settings)
        except InputError as error:
            raise InputError(f"{block.name}/{parameter.name}: {error}") from error
        room = {one.name: one.shape[0] for one in piece.fields if one.name.rpartition(".")[2] in kind.VARIABLE}
        if not room:
            return Encoded(encoding, settings, piece)
        lengths = dict.fromkeys(room, 0)  # the most of all pieces: they are of one size
        with _threads() as pool:
            for number in range(parameter.pieces):
                fields = self._encode(block, parameter, Encoded(encoding, settings, piece), number, pool)
                lengths = {name: max(length, len(fields[name])) for name, length in lengths.items()}
        if any(lengths[name] > room[name] for name in room):
            return None
        return Encoded(encoding, settings, encodings.fitted(piece, lengths))

    def _matrices(self, block: Block, parameter: Parameter) -> list[Matrix]:
        """The matrices of a piece, stored [outputs, inputs]; each one tensor's, where the family does not name them."""
        if parameter.wanted.named:
            return [replace(matrix, transposed=False) for matrix in parameter.piece.matrices]
        return [Matrix("", source.shape) for source in self._sources(block, parameter, 0)]

    def _sources(self, block: Block, parameter: Parameter, piece: int) -> Sequence[TensorSource]:
        sources = self._plan[block.name, parameter.name]
        each = len(sources) // parameter.pieces
        return sources[piece * each : (piece + 1) * each]

    def _encode(
        self, block: Block, parameter: Parameter, form: Encoded, number: int, pool: Executor | None = None
    ) -> encodings.Fields:
        """The fields of one piece."""
        numbers = [self._whole(source) for source in self._sources(block, parameter, number)]
        if form.encoding == CODED:  # without loss: of the numbers as they would be plain
            numbers = [its.to(torch.bfloat16) for its in numbers]
        if parameter.wanted.named:
            plain = self._plain[block.name, parameter.name]
            parts = torch.cat(numbers).split([matrix.stored[0] for matrix in plain])
            numbers = [its.t() if matrix.transposed else its for its, matrix in zip(parts, plain, strict=True)]
        shapes = [tuple(its.shape) for its in numbers]
        require(
            shapes == [matrix.shape for matrix in form.piece.matrices],
            f"{block.name}/{parameter.name} cannot be made of tensors {shapes}: weights and config.json belong to"
            " different models",
        )
        try:
            _check_range(numbers, parameter.dtype)
            return encodings.encode(form.encoding, form.piece.matrices, numbers, form.settings, pool)
        except InputError as error:
            names = ", ".join(source.tensor.name for source in self._sources(block, parameter, number)[:3])
            raise InputError(f"{block.name}/{parameter.name}, of {names}: {error}") from error

    def _whole(self, source: TensorSource) -> torch.Tensor:
        """All numbers of a source."""
        chunks = [chunk.clone() for chunk in self._reader.chunks(source.tensor, source.transposed)]
        return torch.cat(chunks).view(source.shape)

    def chunks(self, block: Block, parameter: Parameter) -> Iterator[memoryview]:
        """The bytes of an encoded parameter, piece by piece."""
        form = parameter.encoded
        assert form is not None, parameter
        with _threads() as pool:
            for number in range(parameter.pieces):
                fields = self._encode(block, parameter, form, number, pool)
                yield encodings.packed(parameter.piece, fields).numpy().data


def _threads() -> ThreadPoolExecutor:
    """A thread a core, in each of which torch has one."""
    return ThreadPoolExecutor(len(os.sched_getaffinity(0)), initializer=torch.set_num_threads, initargs=(1,))


def _check_range(numbers: Sequence[torch.Tensor], dtype: str) -> None:
    """Raises InputError for a number that is decoded to infinity."""
    if dtype == "float16":
        largest, limit = max(its.abs().max().item() for its in numbers), torch.finfo(torch.float16).max
        require(
            not limit < largest < inf,
            f"it holds {largest:.4g}, float16 ends at {limit:.4g}: convert with --dtype bfloat16",
        )


def check_encoded(checkpoint: Checkpoint, name: str) -> None:
    """Raises InputError, naming file and parameter, for fields of a block that its encodings do not make: read piece by piece."""
    for parameter in checkpoint.blocks[name].fielded:
        for piece in range(parameter.pieces):
            where = checkpoint.piece(name, parameter.name, piece)
            content = torch.empty(where.nbytes, dtype=torch.uint8)
            read_full(where.fd, content.numpy().data, where.offset, where.path)
            try:
                encodings.check(parameter, content[None])
            except InputError as error:
                raise InputError(
                    f"{where.path}: '{name}/{parameter.name}', encoded as {parameter.encoding}: {error}"
                ) from error
