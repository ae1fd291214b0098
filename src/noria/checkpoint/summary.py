"""What a checkpoint holds, in words and as JSON."""

from typing import Any

from noria.blocks import Block, Parameter, layer_name
from noria.checkpoint.checkpoint import FORMAT, Checkpoint
from noria.tools.text import nbytes_words, plural


def describe(checkpoint: Checkpoint) -> list[str]:
    """Lines that say what a checkpoint holds. Texts are the file's own: escape them for a terminal."""
    shape, blocks = checkpoint.shape, checkpoint.blocks
    layers = [blocks[name].nbytes for name in blocks if name.startswith("layers/")]
    each = (
        f"{len(layers)} of {nbytes_words(layers[0])}"
        if len(set(layers)) == 1
        else f"{len(layers)}, {nbytes_words(sum(layers))} together"
    )
    texts = ", ".join(f"{name} ({nbytes_words(len(content))})" for name, content in checkpoint.tokenizer.items())
    return [
        f"{checkpoint.path}: checkpoint, version {checkpoint.version}, made from {checkpoint.source}",
        *([f"adapter     {checkpoint.adapter}, merged"] if checkpoint.adapter else []),
        f"family      {checkpoint.family}, dtype {checkpoint.dtype}, {checkpoint.num_parameters:,} parameters",
        f"sizes       {plural(shape.num_layers, 'layer')}, hidden {shape.hidden_size}, heads {shape.num_heads} of"
        f" {shape.head_dim} (key/value {shape.num_kv_heads}), vocabulary {shape.vocab_size:,},"
        f" positions {shape.max_positions:,}"
        f"{', embedding tied to the head' if shape.tied else ''}",
        f"embed       {nbytes_words(blocks['embed'].nbytes)}: {_parameters(blocks['embed'], checkpoint.dtype)}",
        f"layers      {each}: {_parameters(blocks[layer_name(0)], checkpoint.dtype) if layers else 'none'}",
        f"head        {nbytes_words(blocks['head'].nbytes)}: {_parameters(blocks['head'], checkpoint.dtype)}",
        f"tokenizer   {texts or 'none: prompts must be token_ids'}",
        f"hash        {checkpoint.header_hash}",
    ]


def as_dict(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a checkpoint holds, for scripts; keys are only ever added."""
    shape = checkpoint.shape
    return {
        "format": FORMAT,
        "version": checkpoint.version,
        "source": checkpoint.source,
        "adapter": checkpoint.adapter,
        "family": checkpoint.family,
        "dtype": checkpoint.dtype,
        "parameters": checkpoint.num_parameters,
        "nbytes": checkpoint.nbytes,
        "layers": shape.num_layers,
        "vocabulary": shape.vocab_size,
        "positions": shape.max_positions,
        "hash": checkpoint.header_hash,
    }


def _parameters(block: Block, dtype: str) -> str:
    return ", ".join(
        f"{parameter.name} {list(parameter.shape)}{_form(parameter, dtype)}" for parameter in block.parameters
    )


def _form(parameter: Parameter, dtype: str) -> str:
    """How a parameter is stored, where that is not plain in the checkpoint's dtype."""
    if not parameter.plain:
        return f" {parameter.encoding}, {8 * parameter.nbytes / parameter.numbers:.2f} bits"
    return f" {parameter.dtype}" if parameter.dtype != dtype else ""
