"""Which tensors of a model directory make which parameter, and what is wrong with a model whose tensors do not fit.

Which they are is the model family's to say. Reads no numbers.
"""

from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Protocol, Self, TypeVar

from noria.blocks import DTYPE_NBYTES, Parameter
from noria.checkpoint.checkpoint import block_names, model_block
from noria.checkpoint.hugging_face import Directory
from noria.checkpoint.tensor_files import Tensor, slice_of
from noria.errors import InputError
from noria.model import ModelShape
from noria.models._sources import Slice, turned


@dataclass(frozen=True)
class TensorSource:
    """A tensor as a piece of a parameter: as it is stored, or its transpose."""

    tensor: Tensor
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape[::-1] if self.transposed else self.tensor.shape

    @property
    def name(self) -> str:
        return self.tensor.name

    @property
    def shard(self) -> Path:
        return self.tensor.shard

    @property
    def stored(self) -> tuple[int, ...]:
        return self.tensor.shape

    def turned(self) -> "TensorSource":
        return replace(self, transposed=not self.transposed)


class PieceSource(Protocol):
    """A piece of a parameter: its shape there and as stored, what it is of, and itself lying the other way, where it may."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def stored(self) -> tuple[int, ...]: ...

    @property
    def name(self) -> str: ...

    @property
    def shard(self) -> Path: ...

    def turned(self) -> Self: ...


Pieces = TypeVar("Pieces", bound=PieceSource)
Place = tuple[str, str]  # block and parameter
Plan = dict[Place, list[TensorSource]]  # the sources, along dimension 0


def plan_of(
    directory: Directory,
    family: ModuleType,
    shape: ModelShape,
    tensors: dict[str, Tensor],
    others: Container[Place] = (),
) -> Plan:
    """The tensors of every parameter but `others`.

    Raises InputError for the first block that lacks one or has a wrong shape.
    """
    plan: Plan = {}
    names_of = naming(family, shape, tensors)
    for block in block_names(shape):
        wanted = {name: its for name, its in names_of(block).items() if (block, name) not in others}
        looked = {name: find(name, tensors, family.ALIASES) for names in wanted.values() for name in names}
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
            if parameter.name not in wanted:
                continue
            names = wanted[parameter.name]
            sources = [_source(name, found[name], parameter.pieces) for name in names]
            fits = partial(_fit, parameter)
            plan[block, parameter.name] = as_they_lie(block, parameter, names, sources, fits)
            _check_dtypes(sources)
    return plan


def naming(
    family: ModuleType, shape: ModelShape, tensors: Iterable[str]
) -> Callable[[str], dict[str, tuple[str, ...]]]:
    """Gives a family's names of the sources of a block, by parameter: those of experts that have tensors of their own where the
    directory has these, and not tensors of all."""
    apart = getattr(family, "sources_apart", None)
    modules = {name.rpartition(".")[0] for name in tensors} if apart else set()

    def names_of(block: str) -> dict[str, tuple[str, ...]]:
        names: dict[str, tuple[str, ...]] = family.sources(shape, block)
        if apart is None or "experts" not in names:
            return names
        others: dict[str, tuple[str, ...]] = apart(shape, block)
        first = others["experts"][0].rpartition(".")[0]
        return names if modules.isdisjoint(spellings(first, family.ALIASES)) else others

    return names_of


def as_they_lie(
    block: str,
    parameter: Parameter,
    names: Sequence[str],
    sources: list[Pieces],
    fits: Callable[[Sequence[PieceSource]], bool],
) -> list[Pieces]:
    """The sources of a parameter, by a family's `names`; slices lie the other way where they make it so alone.

    transformers 5 writes the experts of some families turned, under the names that are published. `fits`: whether sources
    make the parameter. Raises InputError, naming the odd ones, where they do not.
    """
    if fits(sources):
        return sources
    if all(isinstance(name, Slice) for name in names):
        others = [source.turned() for source in sources]
        if fits(others):
            return others
    odd = [sources[number] for number in odd_ones([source.shape for source in sources], parameter.pieces)]
    have = ", ".join(f"{source.name!r} {list(source.stored)}" for source in odd[:6]) + " and more" * bool(odd[6:])
    raise InputError(
        f"{odd[0].shard}: {have} cannot make {block}/{parameter.name} {list(parameter.shape)}, the shape that config.json"
        " asks for: weights and config.json belong to different models"
    )


def _fit(parameter: Parameter, sources: Sequence[PieceSource]) -> bool:
    """Whether sources, one after another, have the rows and the columns of a parameter."""
    rows, wanted = sum(source.shape[0] if source.shape else 0 for source in sources), parameter.shape
    if len(wanted) == 3:  # its first two dimensions are rows
        wanted = (wanted[0] * wanted[1], wanted[2])
    return all((rows, *source.shape[1:]) == wanted for source in sources)


def _source(name: str, tensor: Tensor, pieces: int) -> TensorSource:
    """What a family's name of a source means in its tensor; of a tensor that has not as many slices, all."""
    if isinstance(name, Slice) and len(tensor.shape) == 3 and tensor.shape[0] == pieces:
        tensor = slice_of(tensor, name.number)
    return TensorSource(tensor, turned(name))


def _instead(missing: str, tensors: Iterable[str]) -> str:
    """What to do about a tensor that is missing: of a quantized, adapted or wrapped model its module has other names."""
    module = missing.rpartition(".")[0] + "."
    found = sorted(name for name in tensors if module in name and name not in (f"{module}weight", f"{module}bias"))
    if not found:
        return "download it again"
    return (
        f"instead they hold {first_names(found)}: save the model by save_pretrained() of transformers, unquantized and with"
        " its adapters merged, and convert that"
    )


def first_names(names: list[str]) -> str:
    """The first of these names of tensors, for a message."""
    return ", ".join(map(repr, names[:5])) + (" ..." if names[5:] else "")


def find(name: str, tensors: Mapping[str, Tensor], aliases: Iterable[tuple[str, str]]) -> Tensor | None:
    """The tensor of this name, or of one that older checkpoints give it."""
    return next((tensors[its] for its in spellings(name, aliases) if its in tensors), None)


def spellings(name: str, aliases: Iterable[tuple[str, str]]) -> list[str]:
    """A tensor's name, and those that older checkpoints give it."""
    return [name] + [replacement + name[len(prefix) :] for prefix, replacement in aliases if name.startswith(prefix)]


def _check_dtypes(sources: Sequence[TensorSource]) -> None:
    for tensor in (source.tensor for source in sources):
        if tensor.dtype not in DTYPE_NBYTES:
            raise InputError(
                f"{tensor.shard}: {tensor.name!r} is {tensor.dtype!r}: Noria converts {', '.join(DTYPE_NBYTES)}"
            )


def odd_ones(shapes: Sequence[tuple[int, ...]], pieces: int) -> list[int]:
    """The numbers of the shapes that are not as most are at the same place of their pieces; all if none is odd."""
    each = max(len(shapes) // pieces, 1)
    usual = [Counter(shapes[place::each]).most_common(1)[0][0] for place in range(min(each, len(shapes)))]
    odd = [number for number, shape in enumerate(shapes) if shape != usual[number % each]]
    return odd or list(range(len(shapes)))


def shared(plan: Plan) -> str | None:
    """The parameter of `embed` that is made of the very tensor that the head's matrix is made of."""
    head = plan.get(("head", "lm_head"))
    return next((name for (block, name), sources in plan.items() if block == "embed" and sources == head), None)
