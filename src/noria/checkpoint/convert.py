"""Makes a checkpoint of a Hugging Face directory, a few MiB at a time whatever the model's size.

Everything is checked before the first byte is written: the architecture, every tensor's presence and shape, the
space on the disk. Which tensors make a parameter is the model family's to say.
"""

import os
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from os.path import commonpath
from pathlib import Path
from types import ModuleType

import torch

from noria.blocks import DTYPE_NBYTES, Block, Parameter
from noria.checkpoint.checkpoint import TOKENIZER_FILES, block_names, model_block, model_shape, open_checkpoint
from noria.checkpoint.hugging_face import Directory
from noria.checkpoint.tensor_files import CHUNK_NBYTES, Reader, Tensor
from noria.checkpoint.writer import Header, file_nbytes, replacing, write_checkpoint
from noria.errors import InputError, require
from noria.model import ModelShape
from noria.models._sources import Transposed
from noria.tools import atomic
from noria.tools.lock import OutputLock
from noria.tools.looks import looks_of, refuse_changed
from noria.tools.provenance import now
from noria.tools.text import plural
from noria.tools.writing import making

# Tensors that old checkpoints carry and no model needs: they are computed.
IGNORED = (
    ".rotary_emb.inv_freq",
    ".rotary_emb.cos_cached",
    ".rotary_emb.sin_cached",
    ".masked_bias",
    ".attn.bias",  # GPT-2's causal mask
    ".position_ids",
)

_TEXTS = ("config.json", "generation_config.json", *TOKENIZER_FILES)  # that are read beside the weights
WIDER = {"float16": "bfloat16", "bfloat16": "float32", "float32": "float64"}  # dtypes of a larger range

Progress = Callable[[str, int, int], None]  # block, bytes done, bytes in all


@dataclass(frozen=True)
class TensorSource:
    """A tensor as a piece of a parameter: as it is stored, or its transpose."""

    tensor: Tensor
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape[::-1] if self.transposed else self.tensor.shape


Plan = dict[tuple[str, str], list[TensorSource]]  # the sources, along dimension 0, of (block, parameter)


@dataclass(frozen=True)
class Converted:
    """What was made: the layout, and notes for the user, one line each."""

    shape: ModelShape
    dtype: str
    nbytes: int
    notes: list[str]


def convert(
    source: str | Path,
    target: str | Path,
    dtype: str = "auto",
    progress: Progress | None = None,
    overwrite: bool = False,
) -> Converted:
    """Converts the model in directory `source` into the checkpoint `target`.

    dtype auto is the source's own. Raises InputError for anything about the source or the target that is not right,
    before the target is touched, and while another process makes it; the target appears whole or not at all.
    """
    target = Path(target)
    notes: list[str] = []
    _check_target(target, overwrite)
    holder = {"job": "", "what": "noria convert", "host": socket.gethostname(), "process": os.getpid(), "start": now()}
    with OutputLock(target, holder, notes.append):
        made = _convert(source, target, dtype, progress, overwrite)
    return replace(made, notes=notes + made.notes)


def _convert(source: str | Path, target: Path, dtype: str, progress: Progress | None, overwrite: bool) -> Converted:
    _check_target(target, overwrite)  # again: the holder before may have made it
    directory = Directory(source)
    before = looks_of(directory.path / name for name in os.listdir(directory.path))
    found = directory.json("config.json")
    assert found is not None, "a Directory has a config.json"
    config_text, config = found
    generation = directory.json("generation_config.json")
    tensors = directory.tensors()
    family, shape = model_shape(config, str(directory.path))
    plan = _plan(directory, family, shape, tensors)
    _check_tied(plan, tensors, shape)
    dtype, notes = _choose_dtype(plan, dtype)
    blocks = {name: model_block(family, shape, name, dtype) for name in block_names(shape)}
    header = Header(
        shape.family, dtype, directory.name, config_text, generation[0] if generation else "{}", directory.tokenizer()
    )
    _check_space(target, file_nbytes(blocks, header))
    notes += _left_over(plan, tensors, shape) + _tokenizer_notes(header)
    source_of = _ParameterBytes(plan, dtype, sum(block.nbytes for block in blocks.values()), progress)
    remedy = "what was written is removed: make room, or name a file on another disk, and convert again"
    with making(target, remedy), replacing(target, overwrite) as temporary:
        write_checkpoint(temporary, header, blocks, _shared(plan), source_of.chunks)
        with open_checkpoint(temporary):
            pass  # what was written reads back as a checkpoint
        used = {tensor.shard for tensor in tensors.values()} | {directory.path / name for name in _TEXTS}
        refuse_changed({path: look for path, look in before.items() if path in used}, "converted")
    return Converted(shape, dtype, target.stat().st_size, notes)


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


def _plan(directory: Directory, family: ModuleType, shape: ModelShape, tensors: dict[str, Tensor]) -> Plan:
    """The tensors of every parameter. Raises InputError for the first block that lacks one or has a wrong shape."""
    plan: Plan = {}
    for block in block_names(shape):
        wanted = family.sources(shape, block)
        looked = {name: _find(name, tensors, family.ALIASES) for names in wanted.values() for name in names}
        if shape.tied and "lm_head.weight" in tensors:  # the embedding may be stored under the head's name alone
            tied = family.sources(shape, "embed")["tokens"]
            looked |= {name: tensors["lm_head.weight"] for name in tied if name in looked and looked[name] is None}
        missing = [name for name, tensor in looked.items() if tensor is None]
        found = {name: tensor for name, tensor in looked.items() if tensor is not None}
        if missing:
            named = ", ".join(map(repr, missing[:3])) + (" and more" if missing[3:] else "")
            raise InputError(
                f"{directory.path} lacks {named}: {block} of {shape.family} needs {len(missing)} tensors"
                f" that none of its files holds; {_instead(missing[0], tensors)}"
            )
        for parameter in model_block(family, shape, block, "float32").parameters:
            sources = [TensorSource(found[name], isinstance(name, Transposed)) for name in wanted[parameter.name]]
            _check_sources(block, parameter, sources)
            plan[block, parameter.name] = sources
    return plan


def _instead(missing: str, tensors: Iterable[str]) -> str:
    """What to do about a tensor that is missing: of a quantized, adapted or wrapped model its module has other names."""
    module = missing.rpartition(".")[0] + "."
    found = sorted(name for name in tensors if module in name and name not in (f"{module}weight", f"{module}bias"))
    if not found:
        return "download it again"
    return (
        f"instead they hold {_listed(found)}: save the model by save_pretrained() of transformers, unquantized and with"
        " its adapters merged, and convert that"
    )


def _find(name: str, tensors: dict[str, Tensor], aliases: Iterable[tuple[str, str]]) -> Tensor | None:
    names = [name] + [replacement + name[len(prefix) :] for prefix, replacement in aliases if name.startswith(prefix)]
    return next((tensors[name] for name in names if name in tensors), None)


def _check_sources(block: str, parameter: Parameter, sources: list[TensorSource]) -> None:
    rows = sum(source.shape[0] if source.shape else 0 for source in sources)
    wanted = parameter.shape
    if len(wanted) == 3:  # its first two dimensions are rows
        wanted = (wanted[0] * wanted[1], wanted[2])
    if any((rows, *source.shape[1:]) != wanted for source in sources):
        have = ", ".join(f"{source.tensor.name!r} {list(source.tensor.shape)}" for source in sources[:6])
        have += " and more" if sources[6:] else ""
        raise InputError(
            f"{sources[0].tensor.shard}: {have} cannot make {block}/{parameter.name} {list(parameter.shape)}, the shape"
            " that config.json asks for: weights and config.json belong to different models"
        )
    for tensor in (source.tensor for source in sources):
        if tensor.dtype not in DTYPE_NBYTES:
            raise InputError(
                f"{tensor.shard}: {tensor.name!r} is {tensor.dtype!r}: Noria converts {', '.join(DTYPE_NBYTES)}"
            )


def _choose_dtype(plan: Plan, dtype: str) -> tuple[str, list[str]]:
    """The dtype asked for, or the one that most of the numbers have; and a note if others are cast to it."""
    sizes: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for tensor in {source.tensor.name: source.tensor for sources in plan.values() for source in sources}.values():
        sizes[tensor.dtype] += tensor.size
        counts[tensor.dtype] += 1
    if dtype != "auto":
        return dtype, []
    chosen = sizes.most_common(1)[0][0]
    cast = ", ".join(f"{counts[other]} of {other}" for other in counts if other != chosen)
    return chosen, [f"most tensors are {chosen}; cast to it: {cast}"] if cast else []


def _shared(plan: Plan) -> str | None:
    """The parameter of `embed` that is made of the very tensor that the head's matrix is made of."""
    head = plan.get(("head", "lm_head"))
    return next((name for (block, name), sources in plan.items() if block == "embed" and sources == head), None)


def _check_tied(plan: Plan, tensors: dict[str, Tensor], shape: ModelShape) -> None:
    """Refuses a head of its own in a model whose config.json says that the embedding is its head: which is right?"""
    head, embedding = tensors.get("lm_head.weight"), plan["embed", "tokens"][0].tensor
    if not shape.tied or head is None or head is embedding:
        return
    pairs = zip(Reader().chunks(head), Reader().chunks(embedding), strict=False)
    same = head.shape == embedding.shape and head.dtype == embedding.dtype
    require(
        same and all(torch.equal(one, other) for one, other in pairs),
        f"{head.shard}: {head.name!r} differs from {embedding.name!r}, but config.json says tie_word_embeddings:"
        " set that to false to keep the head, or remove the tensor to use the embedding",
    )


def _left_over(plan: Plan, tensors: dict[str, Tensor], shape: ModelShape) -> list[str]:
    """A note of the tensors that nothing is made of. Raises InputError for those that would change every number."""
    used = {source.tensor.name for sources in plan.values() for source in sources}
    # a tied model's own lm_head is the embedding once more
    tied = {"lm_head.weight"} if shape.tied else set()
    left = sorted(name for name in tensors if name not in used | tied and not name.endswith(IGNORED))
    if not left:
        return []
    computed = tuple(_modules(plan))
    wrong = [name for name in left if name.startswith(computed) or "scale" in name or "lora_" in name]
    if wrong:
        raise InputError(
            f"{tensors[wrong[0]].shard}: {_listed(wrong)}: {shape.family} as config.json describes it would leave out"
            f" {plural(len(wrong), 'tensor')} of the layers that it computes, so all results would be wrong: take the"
            " unquantized model with its adapters merged, or the config.json that belongs to these weights"
        )
    return [f"{plural(len(left), 'tensor')} left out, which {shape.family} does not use: {_listed(left)}"]


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (" ..." if names[5:] else "")


def _modules(plan: Plan) -> set[str]:
    """What the names of all tensors of computed modules begin with: each layer, and each module beside the layers."""
    paths: dict[str, list[str]] = {}
    for (block, _), sources in plan.items():
        paths.setdefault(block, []).extend(source.tensor.name.replace(".", "/") for source in sources)
    layers = {commonpath(found) for block, found in paths.items() if "/" in block}
    others = {path.rpartition("/")[0] for block, found in paths.items() if "/" not in block for path in found}
    return {path.replace("/", ".") + "." for path in layers | others}


def _tokenizer_notes(header: Header) -> list[str]:
    if "tokenizer.json" in header.tokenizer or {"vocab.json", "merges.txt"} <= set(header.tokenizer):
        return []
    made = "AutoTokenizer.from_pretrained(...).save_pretrained(...) of transformers makes one"
    return [
        f"there is no tokenizer.json, and no vocab.json with merges.txt: prompts can only be given as token_ids ({made})"
    ]


class _ParameterBytes:
    """Gives the bytes of each parameter to the writer, cast, and tells how far it is."""

    def __init__(self, plan: Plan, dtype: str, total: int, progress: Progress | None):
        self._plan, self._dtype, self._total, self._progress = plan, getattr(torch, dtype), total, progress
        self._reader, self._cast = Reader(), torch.empty(CHUNK_NBYTES // 2, dtype=self._dtype)
        self._done = 0

    def chunks(self, block: Block, parameter: Parameter) -> Iterator[memoryview]:
        for source in self._plan[block.name, parameter.name]:
            tensor = source.tensor
            for chunk in self._reader.chunks(tensor, source.transposed):
                cast = chunk if chunk.dtype == self._dtype else self._cast[: len(chunk)].copy_(chunk)
                _check_range(chunk, cast, tensor)
                yield cast.view(torch.uint8).numpy().data
                self._done += cast.nbytes
                if self._progress:
                    self._progress(block.name, self._done, self._total)


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
