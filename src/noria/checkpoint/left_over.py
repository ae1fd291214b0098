"""Tensors of a model directory that no parameter is made of: those without effect, and those that would change every number.

Reads no numbers but those of a head that may be the embedding.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from os.path import commonpath
from types import ModuleType

import torch

from noria.checkpoint.sources import Place, Plan, first_names, spellings
from noria.checkpoint.tensor_files import Reader, Tensor
from noria.errors import InputError, require
from noria.model import ModelShape
from noria.tools.text import plural

# Tensors that old checkpoints carry and no model needs: they are computed.
IGNORED = (
    ".rotary_emb.inv_freq",
    ".rotary_emb.cos_cached",
    ".rotary_emb.sin_cached",
    ".masked_bias",
    ".attn.bias",  # GPT-2's causal mask
    ".position_ids",
)
HEAD = "lm_head."  # what the names of the head's tensors begin with
_LAYER = re.compile(r"(?:[a-z_]+\.)*layers\.(\d{1,9})\.")


def check_tied(plan: Plan, tensors: dict[str, Tensor], shape: ModelShape, aliases: Iterable[tuple[str, str]]) -> None:
    """Refuses a head of its own in a model whose config.json says that the embedding is its head: which is right?"""
    embedding = plan["embed", "tokens"][0].tensor
    heads = [tensors[name] for name in sorted(_heads(shape, aliases) & {*tensors}) if name != embedding.name]
    for head in heads:
        pairs = zip(Reader().chunks(head), Reader().chunks(embedding), strict=False)
        same = head.shape == embedding.shape and head.dtype == embedding.dtype
        require(
            same and all(torch.equal(one, other) for one, other in pairs),
            f"{head.shard}: {head.name!r} differs from {embedding.name!r}, but config.json says tie_word_embeddings:"
            " set that to false to keep the head, or remove the tensor to use the embedding",
        )


def _heads(shape: ModelShape, aliases: Iterable[tuple[str, str]]) -> set[str]:
    """Names of a head's matrix that a tied model may have beside its embedding: the same numbers once more."""
    return _spelled({f"{HEAD}weight"}, [*aliases]) if shape.tied else set()


def left_over(
    used_by: Mapping[Place, list[Tensor]], tensors: Mapping[str, Tensor], family: ModuleType, shape: ModelShape
) -> list[str]:
    """A note of the tensors that nothing is made of. Raises InputError for those that would change every number.

    `used_by`: those that each parameter is made of. The family's LEFT_OUT: parts of names of tensors without effect.
    """
    used, left_out = {tensor.name for its in used_by.values() for tensor in its}, getattr(family, "LEFT_OUT", ())
    used |= _heads(shape, family.ALIASES)
    left = sorted(name for name in tensors if name not in used and not name.endswith(IGNORED))
    if not left:
        return []
    computed = tuple(_spelled(_modules(used_by) | {HEAD}, family.ALIASES))
    wrong = [name for name in left if name.startswith(computed) or "lora_" in name or _scales(name, computed)]
    wrong = [name for name in wrong if not (_behind(name, shape) or any(part in name for part in left_out))]
    if wrong:
        raise InputError(
            f"{tensors[wrong[0]].shard}: {first_names(wrong)}: {shape.family} as config.json describes it would leave out"
            f" {plural(len(wrong), 'tensor')} of the layers that it computes, so all results would be wrong: take the"
            " unquantized model with its adapters merged, or the config.json that belongs to these weights"
        )
    return [f"{plural(len(left), 'tensor')} left out, which {shape.family} does not use: {first_names(left)}"]


def _scales(name: str, computed: Iterable[str]) -> bool:
    """Whether a tensor is a scale beside modules that are computed."""
    parent, _, own = name.rpartition(".")
    return "scale" in own and any(module.startswith(parent and f"{parent}.") for module in computed)


def _spelled(names: set[str], aliases: Collection[tuple[str, str]]) -> set[str]:
    """The names in every spelling: a tensor of a computed module may be there once more under another."""
    own = {prefix + name.removeprefix(its) for name in names for prefix, its in aliases if name.startswith(its)}
    return {its for name in names | own for its in spellings(name, aliases)}


def _behind(name: str, shape: ModelShape) -> bool:
    """Whether a tensor is of a layer behind the last one: those are for drafts alone."""
    found = _LAYER.match(name)
    return found is not None and int(found[1]) >= shape.num_layers


def _modules(used_by: Mapping[Place, list[Tensor]]) -> set[str]:
    """What the names of all tensors of computed modules begin with: each layer, and each module beside the layers."""
    paths: dict[str, list[str]] = {}
    for (block, _), its in used_by.items():
        paths.setdefault(block, []).extend(tensor.name.replace(".", "/") for tensor in its)
    layers = {commonpath(found) for block, found in paths.items() if "/" in block}
    others = {path.rpartition("/")[0] for block, found in paths.items() if "/" not in block for path in found}
    return {path.replace("/", ".") + "." for path in layers | others}
