"""Makes a checkpoint of a Hugging Face directory, a few MiB at a time whatever the model's size.

Everything is checked before the first byte is written: the architecture, every tensor's presence and shape, the
space on the disk. Which tensors make a parameter is the model family's to say.
"""

import os
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import torch

from noria.blocks import Block, Parameter
from noria.checkpoint.checkpoint import TOKENIZER_FILES, block_names, model_block, model_shape, open_checkpoint
from noria.checkpoint.encoding import Choose, Forms, PieceEncoder, chosen_by_name
from noria.checkpoint.fields import FieldSources
from noria.checkpoint.hugging_face import Directory, Folder
from noria.checkpoint.left_over import check_tied, left_over
from noria.checkpoint.lora import Adapter
from noria.checkpoint.published import form_of
from noria.checkpoint.sources import Plan, plan_of, shared
from noria.checkpoint.summary import forms_words
from noria.checkpoint.tensor_files import CHUNK_NBYTES, Reader, Tensor
from noria.checkpoint.vocabularies import file_names, has_tokenizer, tokenizer_files
from noria.checkpoint.writer import Header, file_nbytes, replacing, write_checkpoint
from noria.errors import InputError, require
from noria.model import ModelShape
from noria.tools import atomic
from noria.tools.changes import looks_of, refuse_changed
from noria.tools.lock import OutputLock
from noria.tools.provenance import now
from noria.tools.writing import making

_TEXTS = ("config.json", "generation_config.json", *TOKENIZER_FILES)  # that are read beside the weights
WIDER = {"float16": "bfloat16", "bfloat16": "float32", "float32": "float64"}  # dtypes of a larger range

_QUANTIZED = (
    "its weights are quantized already and are stored so: take the unquantized model for an adapter or an encoding"
)

Progress = Callable[[str, int, int], None]  # block, bytes done, bytes in all
Chunks = Callable[[Block, Parameter], Iterator[memoryview]]  # the bytes of a parameter


@dataclass(frozen=True)
class Converted:
    """What was made: the layout, and notes for the user, one line each. forms: in what the numbers are stored, in words;
    nothing where they are plain."""

    shape: ModelShape
    dtype: str
    nbytes: int
    notes: list[str]
    forms: str = ""


def convert(
    source: str | Path,
    target: str | Path,
    dtype: str = "auto",
    progress: Progress | None = None,
    overwrite: bool = False,
    forms: Forms | Choose | None = None,
    lora: str | Path | None = None,
) -> Converted:
    """Converts the model in directory `source` into the checkpoint `target`, with the adapter in directory `lora` merged.

    dtype auto is the source's own. `forms`: how parameters are stored that are not plain. Raises InputError for
    anything about the source or the target that is not right, before the target is touched, and while another process
    makes it; the target appears whole or not at all.
    """
    target = Path(target)
    notes: list[str] = []
    _check_target(target, overwrite)
    holder = {"job": "", "what": "noria convert", "host": socket.gethostname(), "process": os.getpid(), "start": now()}
    with OutputLock(target, holder, notes.append):
        made = _convert(source, target, dtype, progress, overwrite, forms or {}, lora)
    return replace(made, notes=notes + made.notes)


def _convert(
    source: str | Path,
    target: Path,
    dtype: str,
    progress: Progress | None,
    overwrite: bool,
    forms: Forms | Choose,
    lora: str | Path | None,
) -> Converted:
    _check_target(target, overwrite)  # again: the holder before may have made it
    directory = Directory(source, adapted=lora is not None)
    folders = [directory.path] + ([Folder(lora).path] if lora is not None else [])
    before = looks_of(folder / name for folder in folders for name in os.listdir(folder))
    found = directory.json("config.json")
    assert found is not None, "a Directory has a config.json"
    config_text, config = found
    generation = directory.json("generation_config.json")
    tensors = directory.tensors()
    family, shape = model_shape(config, str(directory.path))
    fields = FieldSources(family, shape, form_of(directory, config, tensors), tensors)
    require(not (fields and (forms or lora)), f"{directory.path}: {_QUANTIZED}")
    plan = plan_of(directory, family, shape, tensors, fields)
    check_tied(plan, tensors, shape, family.ALIASES)
    dtype, notes = _choose_dtype(family, shape, plan, dtype)
    notes += _left_over(plan, fields, tensors, family, shape)
    adapter = None if lora is None else Adapter(Path(lora), directory, family, shape, plan, tensors)
    reader = adapter.reader if adapter else Reader()
    plan = adapter.replaced(plan) if adapter else plan
    blocks = {name: model_block(family, shape, name, dtype) for name in block_names(shape)}
    encoder = PieceEncoder(plan, forms if callable(forms) else chosen_by_name(forms), shape.tied, reader)
    blocks = {name: fields.lay_out(encoder.lay_out(block, dtype), dtype) for name, block in blocks.items()}
    tokenizer, made_of = tokenizer_files(directory)
    more = (generation[0] if generation else "{}", tokenizer, str(adapter or ""))
    header = Header(shape.family, dtype, directory.name, config_text, *more)
    _check_space(target, file_nbytes(blocks, header))
    notes += made_of + _tokenizer_notes(header) + (adapter.notes if adapter else [])
    encoded = fields.chunks if fields else encoder.chunks
    source_of = _ParameterBytes(plan, encoded, reader, sum(block.nbytes for block in blocks.values()), progress)
    remedy = "what was written is removed: make room, or name a file on another disk, and convert again"
    with making(target, remedy), replacing(target, overwrite) as temporary:
        write_checkpoint(temporary, header, blocks, shared(plan), source_of.chunks)
        with open_checkpoint(temporary):
            pass  # what was written reads back as a checkpoint
        used = {tensor.shard for tensor in tensors.values()} | {
            directory.path / name for name in (*_TEXTS, *file_names())
        }
        used |= set(adapter.files) if adapter else set()
        refuse_changed({path: look for path, look in before.items() if path in used}, "converted")
    return Converted(shape, dtype, target.stat().st_size, notes, forms_words([*blocks.values()]))


def _left_over(
    plan: Plan, fields: FieldSources, tensors: dict[str, Tensor], family: ModuleType, shape: ModelShape
) -> list[str]:
    """Notes of the tensors that nothing is made of."""
    used_by = {place: [source.tensor for source in sources] for place, sources in plan.items()} | fields.tensors
    used = {tensor.name for its in used_by.values() for tensor in its}
    aside, notes = fields.aside({name: tensor for name, tensor in tensors.items() if name not in used})
    others = {name: its for name, its in tensors.items() if name not in aside}
    return notes + left_over(used_by, others, family, shape)


def _check_target(target: Path, overwrite: bool) -> None:
    if target.is_dir():
        raise InputError(f"{target} is a directory: give the file to make, such as {target / 'model.h5'}")
    if target.exists() and not overwrite:
        raise InputError(f"{target} exists ({target.stat().st_size} bytes): use --overwrite to replace it")
    atomic.check_folder(target)


def _check_space(target: Path, needed: int) -> None:
    space = os.statvfs(atomic.real(target).parent)
    free = space.f_bavail * space.f_frsize
    if needed > free:
        raise InputError(
            f"{target} needs {needed:,} bytes, {free:,} are free in {target.parent.resolve()}:"
            " choose another folder or a narrower --dtype"
        )


def _choose_dtype(family: ModuleType, shape: ModelShape, plan: Plan, dtype: str) -> tuple[str, list[str]]:
    """The dtype asked for, or the one that most of the numbers have; and a note if others are cast to it.

    Parameters with a dtype of their own are not asked.
    """
    sizes: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    own = {
        (name, parameter.name)
        for name in block_names(shape)
        for parameter in model_block(family, shape, name, "float32").parameters
        if parameter.own_dtype
    }
    asked = [source.tensor for place, sources in plan.items() if place not in own for source in sources]
    for tensor in {tensor.name: tensor for tensor in asked}.values():
        sizes[tensor.dtype] += tensor.size
        counts[tensor.dtype] += 1
    if dtype != "auto":
        return dtype, []
    chosen = sizes.most_common(1)[0][0]
    cast = ", ".join(f"{counts[other]} of {other}" for other in counts if other != chosen)
    return chosen, [f"most tensors are {chosen}; cast to it: {cast}"] if cast else []


def _tokenizer_notes(header: Header) -> list[str]:
    if has_tokenizer(header.tokenizer):
        return []
    made = "AutoTokenizer.from_pretrained(...).save_pretrained(...) of transformers makes one"
    return [
        f"there is no tokenizer.json, and no vocab.json with merges.txt: prompts can only be given as token_ids ({made})"
    ]


class _ParameterBytes:
    """Gives the bytes of each parameter to the writer, cast, and tells how far it is."""

    def __init__(self, plan: Plan, encoded: Chunks, reader: Reader, total: int, progress: Progress | None):
        self._plan, self._encoded, self._reader = plan, encoded, reader
        self._total, self._progress = total, progress
        self._buffer = torch.empty(CHUNK_NBYTES // 2, dtype=torch.float64)
        self._done = 0

    def chunks(self, block: Block, parameter: Parameter) -> Iterator[memoryview]:
        for chunk in self._plain(block, parameter) if parameter.plain else self._encoded(block, parameter):
            yield chunk
            self._done += chunk.nbytes
            if self._progress:
                self._progress(block.name, self._done, self._total)

    def _plain(self, block: Block, parameter: Parameter) -> Iterator[memoryview]:
        dtype = getattr(torch, parameter.dtype)
        buffer = self._buffer.view(dtype)
        for source in self._plan[block.name, parameter.name]:
            tensor = source.tensor
            for chunk in self._reader.chunks(tensor, source.transposed):
                cast = chunk if chunk.dtype == dtype else buffer[: len(chunk)].copy_(chunk)
                _check_range(chunk, cast, tensor)
                yield cast.view(torch.uint8).numpy().data


def _check_range(chunk: torch.Tensor, cast: torch.Tensor, tensor: Tensor) -> None:
    """Raises InputError if a number of `chunk` is beyond what the dtype of `cast` can hold."""
    limit = torch.finfo(cast.dtype).max
    if limit < torch.finfo(chunk.dtype).max and (torch.isinf(cast) & torch.isfinite(chunk)).any():
        largest = chunk[torch.isfinite(chunk)].abs().max().item()
        word = str(cast.dtype).removeprefix("torch.")
        raise InputError(
            f"{tensor.shard}: {tensor.name!r} holds {largest:.4g}, {word} ends at {limit:.4g}: convert with --dtype"
            f" {WIDER[word]}"
        )
