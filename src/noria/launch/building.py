"""Kernels of our own, built where a run starts: one rank of each node first, into a folder that others find again.

Knows kinds of attention and the ranks of a node; no rows and no layers.
"""

import os
import stat
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from noria import attention, encodings, kinds
from noria.blocks import Block
from noria.config import Config
from noria.errors import require
from noria.kernels import drawing, fp8, in_order
from noria.kernels.as_stored import Chosen
from noria.kernels.expert_layer import Some
from noria.launch import few_rows, launcher, mpi
from noria.launch.choosing import Linear
from noria.launch.here import ThisRank
from noria.model import ModelShape
from noria.models import _experts, _fused

CACHE = "TRITON_CACHE_DIR"  # where Triton keeps what it builds; its own default is below $HOME
T = TypeVar("T")


def _on_first_of_nodes(here: ThisRank, build: Callable[[], T]) -> list[T]:
    """What `build` returns on each rank: on the first of each node before the others, which find what it built. Collective."""
    first = here.location.local_rank == 0
    built = mpi.on_every_rank(here.comm, lambda: (build(),) if first else None)
    return here.comm.allgather(mpi.on_every_rank(here.comm, lambda: (built or (build(),))[0]))


def build_attention(config: Config, here: ThisRank, shape: ModelShape, dtype: str) -> str:
    """Builds the kernels of the run's attention; says which kind it is, why no faster one, and how long that took.

    Returns the kind that all ranks have, or the slowest of theirs. Collective: the other ranks of a node find what its first
    one built.
    """
    keeps = here.device.type == "cuda" and keep_kernels(config)
    began = time.perf_counter()

    def build() -> tuple[str, str]:
        kind, why = attention.fitting(here.device, getattr(torch, dtype), shape)
        return kinds.name_of(kind), why

    found = _on_first_of_nodes(here, build)
    took = f" ({time.perf_counter() - began:.1f} s; kept in {keeps})" if keeps and found[0][0] != "sdpa" else ""
    for name, reason in dict.fromkeys(found):
        rank = "" if len({*found}) == 1 else f"rank {found.index((name, reason))}: "
        here.say(f"{rank}attention {name}{': ' * bool(reason)}{reason}{took}")
    return max((name for name, _ in found), key=attention.ORDER.index)


def build_fused(here: ThisRank, shape: ModelShape, dtype: str) -> None:
    """Builds the kernels that layers launch between their products; says where torch computes that, and why. Collective."""
    if here.device.type != "cuda":
        return
    began = time.perf_counter()

    def build() -> str:
        why = _fused.build(shape, here.device, getattr(torch, dtype))
        return f"norms, rotary positions and gates by torch, not by kernels: {why}" if why else ""

    found = _on_first_of_nodes(here, build)
    took = f"norms, rotary positions and gates by kernels ({time.perf_counter() - began:.1f} s)"
    here.say(*dict.fromkeys(line or took for line in found))


def build_sampling(here: ThisRank, shape: ModelShape, dtype: str) -> str:
    """Builds the kernels that draw tokens; returns why some rank has none. Collective."""

    def refuses(device: torch.device, kind: torch.dtype) -> str:
        return drawing.refuses(device, kind, shape.vocab_size)

    return _build_or_say(here, dtype, refuses, "tokens are drawn by torch")


def build_products(here: ThisRank, dtype: str) -> str:
    """Builds the kernel of products of fixed order; returns why some rank has none. Collective."""
    return _build_or_say(here, dtype, in_order.refuses, "products of few rows are torch's")


def build_fp8(here: ThisRank, blocks: Mapping[str, Block], dtype: str) -> None:
    """Builds and tries the kernels of products in fp8. Raises InputError, on every rank, where one cannot compute them.

    Collective.
    """
    weights = [one for block in blocks.values() for one in block.fielded if one.multiplied]
    if not weights:
        return
    found: dict[tuple[int, int], None] = {}
    for one in weights:
        rows, columns = one.settings.get("block_size", (1, 0))
        found[rows, columns] = None
    whys = _on_first_of_nodes(here, lambda: fp8.refuses(here.device, getattr(torch, dtype), tuple(found)))
    rank, why = next(((rank, why) for rank, why in enumerate(whys) if why), (0, ""))
    require(not why, f'products is fp8, and rank {rank} cannot compute them: {why}: set products = "auto"')


def _build_or_say(here: ThisRank, dtype: str, refuses: Callable[[torch.device, torch.dtype], str], instead: str) -> str:
    """Why some rank refuses; what is done instead is said of half precisions on GPUs, which should have the kernels."""
    found = _on_first_of_nodes(here, lambda: refuses(here.device, getattr(torch, dtype)))
    why = next(filter(None, found), "")
    if why and here.device.type == "cuda" and dtype in ("bfloat16", "float16"):
        here.say(f"{instead}: {why}")
    return why


def build_decoders(here: ThisRank, names: Collection[str], dtype: str) -> None:
    """Builds the kernels that decode these encodings, and says which of them torch decodes instead, and why. Collective."""
    if here.device.type != "cuda" or not names:
        return
    found = _on_first_of_nodes(here, lambda: encodings.without_kernel(names, here.device, getattr(torch, dtype)))
    here.say(*dict.fromkeys(line for lines in found for line in lines))


def build_stored(here: ThisRank, blocks: Mapping[str, Block], dtype: str, linear: Linear) -> Chosen:
    """Builds and tries the kernel that multiplies few rows with encoded weights as they are stored; says which are decoded for
    them, and why. Returns those that this rank multiplies so: to the bits of `linear` of decoded numbers. Collective."""
    if here.device.type != "cuda" or not few_rows.weights_of(blocks.values()):
        return ()
    began = time.perf_counter()
    found = _on_first_of_nodes(
        here, lambda: few_rows.chosen(blocks.values(), here.device, getattr(torch, dtype), linear)
    )
    its, took = found[here.rank][0], f" ({time.perf_counter() - began:.1f} s)"
    lines = dict.fromkeys(line for _, lines in found for line in lines)
    here.say(*lines, *[f"few rows are multiplied with encoded weights as they are stored{took}"] * bool(its))
    return its


def build_cache(here: ThisRank, shape: ModelShape, dtype: str) -> None:
    """Builds the kernels of a cache in fewer bits; says where torch rounds and decodes it, and why. Collective."""
    every = (tuple(array for array in shape.arrays(layer) if array.encoding) for layer in range(shape.num_layers))
    entries = {*filter(None, every)}
    if here.device.type != "cuda" or not entries:
        return
    its_dtype = getattr(torch, dtype)

    def build() -> list[str]:
        kind, _ = attention.fitting(here.device, its_dtype, shape)
        why = attention.decodes_ahead(kind, here.device, its_dtype, shape)
        instead = "the cache is decoded before attention, not within it, and decode steps are no graphs"
        said = [f"{instead}: {why}"] if why else []
        return encodings.without_cache_kernels(entries, here.device, its_dtype) + said

    here.say(*dict.fromkeys(line for lines in _on_first_of_nodes(here, build) for line in lines))


def build_mixtures(
    here: ThisRank, shape: ModelShape, dtype: str, encoded: Callable[[], Sequence[tuple[Some, Some]]]
) -> None:
    """Builds the kernels of a model's mixtures of experts; says where torch computes them, and why. Collective.

    encoded: gives some matrices of each kind that the model has encoded, as `_experts.build` takes them.
    """
    if here.device.type != "cuda" or not shape.mixture_size:
        return
    began = time.perf_counter()

    def build() -> str:
        why = _experts.build(shape, here.device, getattr(torch, dtype), encoded())
        return f"mixtures of experts by torch, not by tiles: {why}" if why else ""

    found = _on_first_of_nodes(here, build)
    tiles = f"mixtures of experts by tiles ({time.perf_counter() - began:.1f} s)"
    here.say(*dict.fromkeys(line or tiles for line in found))


def keep_kernels(config: Config) -> str:
    """Where Triton keeps what it builds from now on, for this process: a folder of the user's choice stays."""
    return os.environ.setdefault(CACHE, str(cache_folder(config)))


def cache_folder(config: Config) -> Path:
    """$NORIA_CACHE, else $XDG_CACHE_HOME/noria, else a folder of the user's own on the node's scratch, never $HOME.

    The first that can be written to, the last only if it is nobody else's too; else a new one, of this process alone.
    """
    named = [(os.environ.get(name), below) for name, below in (("NORIA_CACHE", ""), ("XDG_CACHE_HOME", "noria"))]
    for folder in [Path(name) / below / "triton" for name, below in named if name]:
        if _can_be_written(folder):
            return folder
    own = Path(launcher.named_scratch(config) or tempfile.gettempdir()) / f"noria-triton-{os.getuid()}"
    if not _can_be_written(own, mode=0o700) or _is_open_to_others(own):
        own = Path(tempfile.mkdtemp(prefix="noria-triton-"))
    return own


def _can_be_written(folder: Path, mode: int = 0o777) -> bool:
    try:
        folder.mkdir(mode, parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


def _is_open_to_others(folder: Path) -> bool:
    """Whether somebody else may have put code there: a name in a shared folder can be taken by anybody."""
    found = folder.lstat()
    private = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
    return not private
