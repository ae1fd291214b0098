"""What a checkpoint holds, in words and as JSON."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from noria.blocks import DTYPE_NBYTES, Block, Parameter, layer_name
from noria.checkpoint.checkpoint import FORMAT, Checkpoint
from noria.tools.text import nbytes_words, plural

MAX_RUNS = 8  # of layers that a line names


def describe(checkpoint: Checkpoint) -> list[str]:
    """Lines that say what a checkpoint holds. Texts are the file's own: escape them for a terminal."""
    shape, blocks = checkpoint.shape, checkpoint.blocks
    texts = ", ".join(f"{name} ({nbytes_words(len(content))})" for name, content in checkpoint.tokenizer.items())
    return [
        f"{checkpoint.path}: checkpoint, version {checkpoint.version}, made from {checkpoint.source}",
        *([f"adapter     {checkpoint.adapter}, merged"] if checkpoint.adapter else []),
        f"family      {checkpoint.family}, dtype {checkpoint.dtype}, {checkpoint.num_parameters:,} parameters",
        f"sizes       {plural(shape.num_layers, 'layer')}, hidden {shape.hidden_size}, heads {shape.num_heads} of"
        f" {shape.head_dim} (key/value {shape.num_kv_heads}), vocabulary {shape.vocab_size:,},"
        f" positions {shape.max_positions:,}"
        f"{', embedding tied to the head' if shape.tied else ''}",
        f"embed       {nbytes_words(blocks['embed'].nbytes)}: {_parameters([blocks['embed']], checkpoint.dtype)}",
        *_layers([blocks[layer_name(layer)] for layer in range(shape.num_layers)], checkpoint.dtype),
        f"head        {nbytes_words(blocks['head'].nbytes)}: {_parameters([blocks['head']], checkpoint.dtype)}",
        f"tokenizer   {texts or 'none: prompts must be token_ids'}",
        f"hash        {checkpoint.header_hash}",
        *(f"note        {note}" for note in checkpoint.notes),
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
        "encodings": stored_forms(checkpoint.blocks.values()),
        "stored": stored_parameters(checkpoint.blocks.values()),
        "parameters": checkpoint.num_parameters,
        "nbytes": checkpoint.nbytes,
        "layers": shape.num_layers,
        "vocabulary": shape.vocab_size,
        "positions": shape.max_positions,
        "hash": checkpoint.header_hash,
        "notes": checkpoint.notes,
    }


def stored_forms(blocks: Iterable[Block]) -> dict[str, dict[str, int]]:
    """Numbers and bytes of all parameters, by the encoding that they are stored in, or the dtype of plain ones."""
    found: dict[str, dict[str, int]] = {}
    for parameter in (one for block in blocks for one in block.parameters):
        its = found.setdefault(parameter.dtype if parameter.plain else parameter.encoding, {"numbers": 0, "nbytes": 0})
        its["numbers"] += parameter.numbers
        its["nbytes"] += parameter.nbytes
    return found


def stored_parameters(blocks: Iterable[Block]) -> list[dict[str, Any]]:
    """How each kind of parameter is stored: a row for those of one name, in layers or not, that are stored alike."""
    found: dict[tuple[str, str, str, str], list[Parameter]] = {}
    for block in blocks:
        for one in block.parameters:
            kind = block.name.partition("/")[0], one.name, one.encoding, json.dumps([one.dtype, dict(one.settings)])
            found.setdefault(kind, []).append(one)
    return [
        {
            "block": block,
            "name": name,
            "encoding": encoding,
            "dtype": its[0].dtype,
            "settings": dict(its[0].settings),
            "parameters": len(its),
            "numbers": sum(one.numbers for one in its),
            "nbytes": sum(one.nbytes for one in its),
            "bits": round(8 * sum(one.nbytes for one in its) / sum(one.numbers for one in its), 3),
        }
        for (block, name, encoding, _), its in found.items()
    ]


def forms_words(blocks: Sequence[Block]) -> str:
    """`fp8_block 93.1 % (8.00 bits), bfloat16 6.9 %`, of the numbers; nothing where all parameters are plain."""
    if not any(block.encoded for block in blocks):
        return ""
    found = stored_forms(blocks)
    whole, plain = sum(its["numbers"] for its in found.values()), [*DTYPE_NBYTES]
    return ", ".join(
        f"{name} {100 * its['numbers'] / whole:.1f} %"
        + ("" if name in plain else f" ({8 * its['nbytes'] / its['numbers']:.2f} bits)")
        for name, its in sorted(found.items(), key=lambda pair: -pair[1]["numbers"])
    )


def _layers(layers: Sequence[Block], dtype: str) -> list[str]:
    """A line for all layers, or where they do not have the same parameters one more for those that are alike."""
    sizes = [layer.nbytes for layer in layers]
    each = f"of {nbytes_words(sizes[0])}" if len({*sizes}) == 1 else f"{nbytes_words(sum(sizes))} together"
    whole = f"layers      {len(layers)}{' ' if each.startswith('of') else ', '}{each}"
    alike: dict[tuple[tuple[object, ...], ...], list[int]] = {}
    for number, layer in enumerate(layers):
        alike.setdefault(tuple((p.name, p.shape, p.dtype, p.encoding) for p in layer.parameters), []).append(number)
    texts = [_parameters([layers[number] for number in its], dtype) for its in alike.values()]
    if len(texts) < 2:
        return [f"{whole}: {texts[0] if texts else 'none'}"]
    pairs = zip(alike.values(), texts, strict=True)
    return [whole, *(f"            {_numbers_words(its)}: {text}" for its, text in pairs)]


def _numbers_words(numbers: Sequence[int]) -> str:
    """Numbers in order, those that follow each other as first-last: 0, 2-4."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    words = ["-".join(map(str, run)) for run in runs]
    return ", ".join(words[:MAX_RUNS]) + f", ... ({len(numbers)} of them)" * (len(words) > MAX_RUNS)


def _parameters(blocks: Sequence[Block], dtype: str) -> str:
    """The parameters of blocks that have the same."""
    alike = zip(*(block.parameters for block in blocks), strict=True)
    return ", ".join(f"{its[0].name} {list(its[0].shape)}{_form(its, dtype)}" for its in alike)


def _form(alike: Sequence[Parameter], dtype: str) -> str:
    """How parameters are stored, where that is not plain in the checkpoint's dtype; bits of a number on average."""
    parameter = alike[0]
    if not parameter.plain:
        bits = 8 * sum(one.nbytes for one in alike) / sum(one.numbers for one in alike)
        return f" {parameter.encoding}, {bits:.2f} bits"
    return f" {parameter.dtype}" if parameter.dtype != dtype else ""
