"""A LoRA adapter of peft, merged into the tensors of its model while they are converted: W + scale B A, in float32.

E. Hu and others, LoRA (2021), with scale alpha / r, or alpha / sqrt(r) (rsLoRA). Equal to peft's merge_and_unload. What is
merged is what the adapter's file holds; what its config says otherwise is refused.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import torch
import xxhash

from noria.blocks import DTYPE_NBYTES
from noria.checkpoint.checkpoint import block_names
from noria.checkpoint.hugging_face import Directory, Folder
from noria.checkpoint.lora_config import LoraConfig, Module
from noria.checkpoint.sources import Plan, TensorSource, find
from noria.checkpoint.tensor_files import Reader, Tensor, list_tensors
from noria.errors import InputError, require
from noria.model import ModelShape

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(.+)\.(?:lora_(A|B)\.weight|lora_embedding_(A|B))")
_HASHED_NBYTES = 2**22
_TOKENIZER = ("tokenizer.json", "chat_template.jinja")


@dataclass(frozen=True)
class Change:
    """What is added to a matrix as it is stored: scale * left right, [rows, r] and [r, columns]. The factors are A and B of
    peft, [r, in] and [out, r], or their transposes."""

    a: Tensor
    b: Tensor
    scale: float
    transposed: bool  # the matrix is stored [in, out]: A^T B^T

    def factors(self, reader: Reader) -> tuple[torch.Tensor, torch.Tensor]:
        """left and right, whole, as they are in the file."""
        a, b = (torch.cat([chunk.clone() for chunk in reader.chunks(one)]).view(one.shape) for one in (self.a, self.b))
        return (a.t(), b.t()) if self.transposed else (b, a)


class Adapter:
    """An adapter for the model whose parameters `plan` makes of tensors. As text its name and the hash of its two
    files.

    Raises InputError for one that is damaged, of another model, or asks for what is not done.
    """

    def __init__(
        self,
        path: Path,
        directory: Directory,
        family: ModuleType,
        shape: ModelShape,
        plan: Plan,
        tensors: Mapping[str, Tensor],
    ):
        folder = Folder(path)
        found = folder.json(CONFIG)
        if found is None:
            raise InputError(f"{path} has no {CONFIG}: give the directory of an adapter of peft")
        weights = next((file for name in WEIGHTS if (file := folder.file(name))), None)
        if weights is None:
            raise InputError(f"{path} has no weights of an adapter: none of {', '.join(WEIGHTS)}")
        self._said = f"{folder.name} {_hash(path / CONFIG, weights)}"
        self.files = [path / CONFIG, weights]
        others = [name for name in _TOKENIZER if folder.content(name) not in (None, directory.content(name))]
        self.notes = [f"{path / name} is not taken: the model's own is" for name in others]
        self._model = _Model(family, shape, plan, tensors)
        factors, self._saved = self._sorted(list_tensors(weights))
        config = LoraConfig(found[1], path / CONFIG)
        changes = self._changes(factors, config)
        self._check_saved(config)
        self.reader = _MergingReader(
            {self._saved[own].name if own in self._saved else own: one for own, one in changes.items()}
        )

    def __str__(self) -> str:
        return self._said

    def replaced(self, plan: Plan) -> Plan:
        """The plan with the tensors that the adapter holds whole in the place of the model's."""
        return {place: [self._source(one) for one in sources] for place, sources in plan.items()}

    def _source(self, source: TensorSource) -> TensorSource:
        return replace(source, tensor=self._saved.get(source.tensor.name, source.tensor))

    def _sorted(self, tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
        """Module -> its A and B; and the tensors that are whole, by their name in the model's files."""
        factors: dict[str, dict[str, Tensor]] = {}
        saved: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            require(
                name.startswith(_PREFIX),
                f"{tensor.shard}: {name[:100]!r} does not begin with {_PREFIX}, as peft's tensors do",
            )
            require(
                tensor.dtype in DTYPE_NBYTES,
                f"{tensor.shard}: {name[:100]!r} is {tensor.dtype!r}: Noria reads {', '.join(DTYPE_NBYTES)}",
            )
            if match := _FACTOR.fullmatch(name.removeprefix(_PREFIX)):
                factors.setdefault(match[1], {})[match[2] or match[3]] = tensor
                continue
            wanted = name.removeprefix(_PREFIX).replace(".base_layer.", ".").replace(".modules_to_save.", ".")
            own = self._model.tensor(wanted, tensor)
            require(
                own.shape == tensor.shape,
                f"{tensor.shard}: {name[:100]!r} is {list(tensor.shape)}, {own.name!r} of the model {list(own.shape)}: the"
                " vocabulary was changed in training; give the model with its new vocabulary",
            )
            _refuse_not_finite(tensor)
            require(
                len(own.shape) < 3,
                f"{tensor.shard}: {name[:100]!r} is all experts of a layer in one tensor, which is not merged: merge it by peft",
            )
            if not (self._model.is_tied(own) and _same(own, tensor)):
                self._model.refuse_tied(own, tensor)
                saved[own.name] = tensor
        return factors, saved

    def _changes(self, factors: Mapping[str, Mapping[str, Tensor]], config: LoraConfig) -> dict[str, Change]:
        for name, pair in factors.items():
            self._model.tensor(f"{name}.weight", next(iter(pair.values())))
        modules = config.modules(sorted({*factors, *self._model.modules}))
        for module, pair in factors.items():
            lacking = {"A", "B"} - set(pair)
            require(
                not lacking, f"{self.files[1]} has half of the change of {module}: lora_{''.join(lacking)} is missing"
            )
            require(
                modules[module].is_target,
                f"{self.files[1]} changes {module}, which target_modules of {CONFIG} does not name: they are of two adapters",
            )
        missing = [name for name in self._model.modules if modules[name].is_target and name not in factors]
        require(
            config.every_linear or not missing,
            f"{self.files[1]} does not change {', '.join(missing[:3])}{' and more' * (len(missing) > 3)}, which target_modules"
            f" of {CONFIG} names: download it again",
        )
        return dict(self._change(name, pair["A"], pair["B"], modules[name]) for name, pair in factors.items())

    def _change(self, name: str, a: Tensor, b: Tensor, module: Module) -> tuple[str, Change]:
        own = self._model.tensor(f"{name}.weight", a)
        self._model.refuse_tied(own, a)
        transposed = a.name.endswith("lora_embedding_A") or self._model.stored_in_out(own)
        wanted = own.shape[::-1] if transposed else own.shape
        fits = len(own.shape) == 2 and (a.shape, b.shape) == ((module.rank, wanted[1]), (wanted[0], module.rank))
        require(
            fits,
            f"{a.shard}: {name} has A {list(a.shape)} and B {list(b.shape)}, of rank {module.rank}: they do not fit"
            f" {own.name!r} {list(own.shape)}: the adapter is of another model, or its {CONFIG} of another adapter",
        )
        for factor in (a, b):
            _refuse_not_finite(factor)
        return own.name, Change(a, b, module.scale, transposed)

    def _check_saved(self, config: LoraConfig) -> None:
        for module in config.modules_to_save:
            found = any(f".{module}." in f".{name}" for name in self._saved)
            require(
                found,
                f"{self.files[1]} has no tensors of {module}, which modules_to_save of {CONFIG} names: download it again",
            )


class _Model:
    """What an adapter asks of its model. `modules`: the matrices of its layers, as transformers names them."""

    def __init__(self, family: ModuleType, shape: ModelShape, plan: Plan, tensors: Mapping[str, Tensor]):
        self._family, self._tied, self._tensors = family, shape.tied, tensors
        self._sources = {one.tensor.name: one for sources in plan.values() for one in sources}
        self._embedding = plan["embed", "tokens"][0].tensor
        blocks = (family.sources(shape, block) for block in block_names(shape) if "/" in block)
        names = (name for sources in blocks for of_parameter in sources.values() for name in of_parameter)
        # Experts, which newer versions of transformers keep as one parameter, may be no modules there.
        known = (name for name in names if name.endswith(".weight") and ".experts." not in name)
        self.modules = [str(name).removesuffix(".weight") for name in known if len(self.tensor(name).shape) == 2]

    def tensor(self, name: str, of: Tensor | None = None) -> Tensor:
        """The model's tensor of this name. Raises InputError where none of its parameters is made of it; `of`: the adapter's."""
        found = find(name, self._tensors, self._family.ALIASES)
        if found is None or found.name not in self._sources:
            assert of is not None, f"the plan has no {name}"
            tied = self._tied and name.startswith("lm_head.")
            why = (
                "its config.json says tie_word_embeddings"
                if tied
                else "the adapter is of another model, or of another task"
            )
            raise InputError(
                f"{of.shard}: {of.name[:120]!r} is of {name[:120]!r}, which the model does not have: {why}"
            )
        return found

    def stored_in_out(self, tensor: Tensor) -> bool:
        """Whether the model's files have the matrix [in, out], as transformers' Conv1D does."""
        return self._sources[tensor.name].transposed and ".experts." not in tensor.name

    def is_tied(self, tensor: Tensor) -> bool:
        return self._tied and tensor.name == self._embedding.name

    def refuse_tied(self, own: Tensor, of: Tensor) -> None:
        """Raises InputError for a change of the embedding that is the head too: was one meant, or both?"""
        require(
            not self.is_tied(own),
            f"{of.shard}: {of.name[:120]!r} changes the embedding, which is the head too (tie_word_embeddings in config.json):"
            " merge it by peft, which says which of them it changes, and convert that",
        )


class _MergingReader(Reader):
    """Reads tensors with what is added to them, by their names; sums are in float32, of float64 in that."""

    def __init__(self, changes: Mapping[str, Change]):
        super().__init__()
        self._changes = changes

    def chunks(self, tensor: Tensor, transposed: bool = False) -> Iterator[torch.Tensor]:
        """As Reader.chunks, merged."""
        chunks, change = super().chunks(tensor, transposed), self._changes.get(tensor.name)
        return chunks if change is None else _merged(chunks, change, tensor, transposed)


def _merged(chunks: Iterable[torch.Tensor], change: Change, tensor: Tensor, transposed: bool) -> Iterator[torch.Tensor]:
    """The chunks, which follow each other in row-major order, with what is added to them."""
    dtype = torch.promote_types(getattr(torch, tensor.dtype), torch.float32)
    left, right = (factor.to(dtype) for factor in change.factors(Reader()))
    if transposed:
        left, right = right.t(), left.t()
    columns, done = right.shape[1], 0
    for chunk in chunks:
        first, last = done // columns, -(-(done + len(chunk)) // columns)
        added = (left[first:last] @ right).mul_(change.scale).view(-1)
        begin = done - first * columns
        yield added[begin : begin + len(chunk)].add_(chunk)
        done += len(chunk)


def _refuse_not_finite(tensor: Tensor) -> None:
    """Raises InputError for a tensor of the adapter with NaN or infinity, which the merged model would have everywhere."""
    for chunk in Reader().chunks(tensor):
        require(
            bool(torch.isfinite(chunk).all()),
            f"{tensor.shard}: {tensor.name[:120]!r} has numbers that are not finite (NaN or infinity): the adapter's training"
            " failed, or it is damaged",
        )


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape have the same numbers."""
    pairs = zip(Reader().chunks(one), Reader().chunks(other), strict=False)
    return one.dtype == other.dtype and all(torch.equal(first, second) for first, second in pairs)


def _hash(*paths: Path) -> str:
    """Of the bytes of files, one after another."""
    digest = xxhash.xxh3_128()
    for path in paths:
        digest.update(path.stat().st_size.to_bytes(8, "little"))
        with path.open("rb") as file:
            while data := file.read(_HASHED_NBYTES):
                digest.update(data)
    return digest.hexdigest()
