"""Encodes parameters on their way into a checkpoint, a piece at a time: whole matrices are in memory meanwhile.

Knows tensors' files and encodings; which parameters are encoded, and how, is the caller's to say.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from noria import encodings, kinds
from noria.blocks import Block, Parameter, lay_out
from noria.checkpoint.sources import Plan, TensorSource
from noria.checkpoint.tensor_files import Reader
from noria.errors import require
from noria.pieces import Encoded, Matrix, Piece

Forms = Mapping[str, tuple[str, Mapping[str, Any]]]  # a parameter's encoding and its settings, by its name


class PieceEncoder:
    """Lays out and encodes the parameters that `forms` names, wherever there are some, made of the tensors in `plan`.

    An embedding stays plain, and so does the head that is one.
    """

    def __init__(self, plan: Plan, forms: Forms, tied: bool, reader: Reader):
        self._plan, self._forms, self._tied, self._reader = plan, forms, tied, reader
        # Of each source of a piece, whether it is [inputs, outputs].
        self._turned: dict[tuple[str, str], list[bool]] = {}

    def lay_out(self, block: Block, dtype: str) -> Block:
        """The layout of a plain block with its encoded parameters. One whose numbers find no room there stays plain."""
        found: dict[str, Encoded] = {}
        for parameter in block.parameters:
            gathered = block.name == "embed" or (self._tied and parameter.name == "lm_head")
            if parameter.name in self._forms and not gathered:
                form = self._form(block, parameter, dtype)
                found |= {} if form is None else {parameter.name: form}
        wanted = {parameter.name: parameter.wanted for parameter in block.parameters}
        return lay_out(block.name, wanted, dtype, found) if found else block

    def _form(self, block: Block, parameter: Parameter, dtype: str) -> Encoded | None:
        encoding, said = self._forms[parameter.name]
        kind = kinds.load("encodings", encoding)
        settings = kind.DEFAULTS | said
        sources, plain = self._sources(block, parameter, 0), parameter.piece.matrices
        turned = [matrix.transposed for matrix in plain] if parameter.wanted.named else [False] * len(sources)
        self._turned[block.name, parameter.name] = [
            source.transposed != turn for source, turn in zip(sources, turned, strict=True)
        ]
        piece = encodings.capacity(encoding, self._matrices(block, parameter), dtype, settings)
        room = {one.name: one.shape[0] for one in piece.fields if one.name.rpartition(".")[2] in kind.VARIABLE}
        if not room:
            return Encoded(encoding, settings, piece)
        lengths = dict.fromkeys(room, 0)  # the most of all pieces: they are of one size
        for number in range(parameter.pieces):
            fields = self._encode(block, parameter, encoding, settings, piece, number)
            lengths = {name: max(length, len(fields[name])) for name, length in lengths.items()}
        if any(lengths[name] > room[name] for name in room):
            return None
        return Encoded(encoding, settings, encodings.fitted(piece, lengths))

    def _matrices(self, block: Block, parameter: Parameter) -> list[Matrix]:
        """The matrices of a piece, each one tensor's, stored [outputs, inputs]."""
        if parameter.wanted.named:
            return [replace(matrix, transposed=False) for matrix in parameter.piece.matrices]
        return [Matrix("", source.shape) for source in self._sources(block, parameter, 0)]

    def _sources(self, block: Block, parameter: Parameter, piece: int) -> Sequence[TensorSource]:
        sources = self._plan[block.name, parameter.name]
        each = len(sources) // parameter.pieces
        return sources[piece * each : (piece + 1) * each]

    def _encode(
        self, block: Block, parameter: Parameter, encoding: str, settings: Mapping[str, Any], piece: Piece, number: int
    ) -> encodings.Fields:
        """The fields of one piece."""
        numbers = []
        for source, turned in zip(
            self._sources(block, parameter, number), self._turned[block.name, parameter.name], strict=True
        ):
            chunks = [chunk.clone() for chunk in self._reader.chunks(source.tensor)]
            whole = torch.cat(chunks).view(source.tensor.shape)
            numbers.append(whole.t() if turned else whole)
        shapes = [tuple(its.shape) for its in numbers]
        require(
            shapes == [matrix.shape for matrix in piece.matrices],
            f"{block.name}/{parameter.name} cannot be made of tensors {shapes}: weights and config.json belong to"
            " different models",
        )
        return encodings.encode(encoding, piece.matrices, numbers, settings)

    def chunks(self, block: Block, parameter: Parameter) -> Iterator[memoryview]:
        """The bytes of an encoded parameter, piece by piece."""
        for number in range(parameter.pieces):
            fields = self._encode(block, parameter, parameter.encoding, parameter.settings, parameter.piece, number)
            yield encodings.packed(parameter.piece, fields).numpy().data
