"""What rank 0 finds in the user's files before anything is loaded: a run is refused here or not at all.

Opens model, prompts and output; knows no device and no rank.
"""

import contextlib
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from noria.arrays import ENCODINGS, encoded
from noria.blocks import DTYPE_NBYTES, Block
from noria.checkpoint.checkpoint import open_checkpoint, parse_json
from noria.checkpoint.random_weights import random_checkpoint
from noria.config import Config
from noria.desk import validation
from noria.desk.exports import check_exports
from noria.desk.identity import Identity, check_finished, identity
from noria.desk.inputs import prompts_of
from noria.desk.lengths import look
from noria.desk.mended import mended
from noria.desk.old_rules import check_rendering
from noria.desk.products import check_products, with_products
from noria.desk.steering import check_constraint
from noria.desk.validation import ModelLimits
from noria.errors import InputError, require
from noria.model import ModelShape, OpenModel
from noria.output.outcome import outcome_of
from noria.output.target import probe_output
from noria.plan import planner
from noria.plan.rounds import Workload
from noria.rows.chat import Chat, Encoder, encoder_of
from noria.rows.making import unknown_ids
from noria.rows.model_sampling import told
from noria.rows.prompt_files import PromptFiles, content_hash, counts, hashed, prompt_files
from noria.rows.prompts import open_prompts
from noria.rows.tokenizer import Tokenizer, tokenizer_of
from noria.sampling import OLD_RULES, Sampling
from noria.tools.helper import Helper
from noria.tools.text import plural

LEAST_SHARE = 0.8  # of a model's vocabulary that a tokenizer of its own has: published ones are padded by less than 3 %


@dataclass(frozen=True)
class Examined:
    """What rank 0 found in the user's files before anything was allocated."""

    state: str  # of the output: absent, parts or finished
    num_rows: int
    shape: ModelShape
    blocks: dict[str, Block]
    dtype: str
    files: PromptFiles  # the prompts, as they were when they were hashed
    prompts_hash: str
    prompt_files: list[dict[str, Any]]  # see prompt_files.prompt_files
    load: Workload  # how long its rows are
    identity: Identity
    said: list[str]  # for the user, a line each
    code: int = 0  # the exit code of a job that finds the output finished
    mended: bool = False  # the prompts of rows in error are others than before: see mended.py


def examine(config: Config, num_ranks: int, device: str, helper: Helper | None = None) -> Examined:
    """Opens and checks every file of the run; loads nothing. Raises InputError for what is wrong with one.

    `helper` renders conversations.
    """
    check_exports(config)
    files = hashed(prompts_of(config))
    by_file, prompts_hash = counts(files), content_hash(files)
    num_rows = sum(by_file)
    with contextlib.closing(open_model(config, dtype_of(config, None, device))) as checkpoint:
        planner.check(config, num_ranks, checkpoint.shape)
        dtype = dtype_of(config, checkpoint.dtype, device)
        check_products(config, device, dtype)
        tokenizer = tokenizer_of(checkpoint)
        encode = _encoder(config, checkpoint, tokenizer, helper)
        # An old output stays where it is until nothing can refuse the run any more: see earlier.make_room.
        state = probe_output(config.output, config.job.overwrite, move=False)
        own = identity(config, files, checkpoint, dtype, tokenizer)
        check_constraint(config.sampling, own.sampling, tokenizer, checkpoint.shape.vocab_size)
        at = partial(_encoder, config, checkpoint, tokenizer, helper)  # a date
        changed = None if state == "absent" else mended(config, files, own, num_rows, at)
        if state == "finished" and check_finished(config, files, own.header, num_rows, changed is not None):
            state = "parts"
        if state == "absent" and config.job.shard is None:
            _refuse_useless(files, num_rows, encode, own.sampling, checkpoint.shape, tokenizer)
        load = look(config, files, checkpoint.shape.max_positions, num_rows, encode)
        outcome = outcome_of(config.output) if state == "finished" else None
        if outcome:
            said = outcome.lines()
        elif own.rules > OLD_RULES:
            said = told(checkpoint.generation_config, config.sampling, own.taken)
        else:
            said = check_rendering(config, files, own, num_rows, at)
        names, code = prompt_files(files, by_file), outcome.code(config.job.fail_on_errors) if outcome else 0
        shape, blocks = checkpoint.shape, checkpoint.blocks
        said = [*checkpoint.notes, *said, *(changed or [])]
        found = state, num_rows, shape, blocks, dtype, files, prompts_hash, names, load, own, said, code
        return Examined(*found, mended=changed is not None)


def _refuse_useless(
    files: PromptFiles, num_rows: int, encode: Encoder, sampling: Sampling, shape: ModelShape, tokenizer: Tokenizer
) -> None:
    """Raises InputError, with the reasons, if there are rows and none of the first LOOKED_AT can run."""
    limits = ModelLimits(shape.max_positions, shape.vocab_size, end_words=shape.end_words)
    reasons = validation.all_wrong(open_prompts(files), encode, sampling, limits, tokenizer)
    if reasons is not None:
        most = validation.LOOKED_AT
        first = f"the first {most:,} rows" if num_rows > most else plural(num_rows, "row")
        raise InputError(
            f"none of {first} of {files} can run: {'; '.join(reasons.lines())}; nothing is written (noria validate --all"
            " lists them)"
        )


def _encoder(
    config: Config, checkpoint: OpenModel, tokenizer: Tokenizer, helper: Helper | None, date: datetime | None = None
) -> Encoder:
    """The run's way from rows to token ids. Raises InputError for what the model, its tokenizer or template cannot honour."""
    unknown = unknown_ids(config.sampling, checkpoint.shape.vocab_size)
    require(unknown is None, f"sampling.{unknown}")
    return encoder_of(checkpoint, tokenizer, config.sampling, date or datetime.now(), lambda message: None, helper)


def doubts(tokenizer: Tokenizer, chat: Chat, vocab_size: int) -> list[str]:
    """What of a checkpoint's texts cannot be used as it is, though rows of token_ids run."""
    said = []
    unknown = sorted(id for id in tokenizer.end_token_ids if not 0 <= id < vocab_size)
    if unknown:
        said.append(f"end token {unknown[0]} is not in the model's vocabulary of {vocab_size}: no row can end with it")
    if not tokenizer.end_token_ids:
        said.append(
            "config.json, generation_config.json and the tokenizer name no end token: rows end at max_new_tokens"
        )
    size = tokenizer.vocab_size
    if size > vocab_size or 0 < size < LEAST_SHARE * vocab_size:
        said.append(
            f"the tokenizer has {size:,} ids, the model's vocabulary {vocab_size:,}: the ids of its texts may not be this"
            " model's; if its files are of another model, convert again with those of this one"
        )
    return said + ([chat.error] if chat.error else [])


def open_model(config: Config, dtype: str) -> OpenModel:
    """The model's blocks, with the run's context and cache: the user's checkpoint, or random ones of a config.json's shape."""
    opened = _open(config, dtype)
    try:
        opened.shape = with_cache(with_context(opened, config.max_context), config.kv_cache_dtype)
        opened.blocks = with_products(opened, config.products)
    except InputError:
        opened.close()
        raise
    return opened


def with_context(opened: OpenModel, most: int | None) -> ModelShape:
    """The model's shape with `most` positions, if that is said. Raises InputError where it cannot compute so many."""
    shape = opened.shape
    learned = any(parameter.name == "positions" for parameter in opened.blocks["embed"].parameters)
    end = shape.end_words or ("its positions are a table of that length" if learned else "")
    require(
        most is None or most <= shape.max_positions or not end,
        f"max_context is {most}, the model's context {shape.max_positions} ({end}): give at most {shape.max_positions}",
    )
    return shape if most is None else replace(shape, max_positions=most)


def with_cache(shape: ModelShape, dtype: str) -> ModelShape:
    """The model's shape with a cache of this kv_cache_dtype. Raises InputError where what it leaves there is never rounded."""
    if dtype == "auto":
        return shape
    own = {array.name for layer in range(shape.num_layers) for array in shape.arrays(layer) if array.per == "token"}
    require(
        own,
        f"kv_cache_dtype is {dtype}: {shape.family} leaves no keys and values in a cache: leave it out, or set auto",
    )
    cache = tuple(encoded(entry, ENCODINGS[dtype]) for entry in shape.cache)
    plain = {
        array.name
        for entry in cache
        if not isinstance(entry, int)
        for array in entry
        if array.per == "token" and not array.encoding
    }
    require(
        not plain,
        f"kv_cache_dtype is {dtype}: {shape.family} keeps {', '.join(sorted(plain))} in a dtype of its own: set auto",
    )
    return replace(shape, cache=cache)


def _open(config: Config, dtype: str) -> OpenModel:
    if config.model is not None:
        model = Path(config.model)
        found = "is a folder" if model.is_dir() else "does not exist"
        require(model.is_file(), f"model {model} {found}: noria convert HF_DIR MODEL.h5 makes a checkpoint")
        return open_checkpoint(config.model)
    assert config.job.random_weights is not None, "a run has a model or random weights"
    return random_checkpoint(_shape_file(config.job.random_weights), dtype)


def _shape_file(path: str) -> dict[str, Any]:
    """The config.json of random weights."""
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"random_weights {path}: {error.strerror}") from error
    return parse_json(text, path)


def dtype_of(config: Config, stored: str | None, device: str) -> str:
    """The run's dtype: what was asked, else float32 on a CPU, and on a GPU the checkpoint's or what a config.json says."""
    if config.dtype != "auto":
        return config.dtype
    if device != "cpu" and stored is None and config.job.random_weights:
        shape = _shape_file(config.job.random_weights)
        named = shape.get("dtype", shape.get("torch_dtype"))
        stored = named if named in DTYPE_NBYTES else None
    return "float32" if device == "cpu" else stored or "bfloat16"
