"""Checks a run without running it: tokenizes every prompt and checks its settings, the paths and the disk space.

Needs no GPU, no MPI and no ranks: use it on a login node. The exit code is 2 if anything is wrong.
"""

import argparse
import contextlib
import os
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from noria.commands import flags
from noria.commands.flags import load
from noria.config import Config
from noria.desk.examination import doubts, open_model
from noria.desk.exports import check_exports, exports_of
from noria.desk.inputs import files_of_run, prompts_of
from noria.desk.steering import check_constraint, settled
from noria.desk.validation import SHOWN, Findings, ModelLimits, findings_of
from noria.errors import InputError
from noria.launch import tracing
from noria.output.generations import open_generations
from noria.output.sealed import part_files, parts_folder
from noria.rows.chat import Chat, Encoder
from noria.rows.model_sampling import taken, told
from noria.rows.prompt_files import count
from noria.rows.prompts import noted, open_prompts
from noria.rows.template import template_helper
from noria.rows.tokenizer import tokenizer_of
from noria.tools.atomic import check_file
from noria.tools.lock import check_names
from noria.tools.looking import Looker
from noria.tools.text import plural, printable
from noria.tools.values import shard_rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--all", action="store_true", help="list every wrong row, not only the first 10")
    flags.add_arguments(parser, "[--all] ")


def run(arguments: argparse.Namespace) -> int:
    config = load(arguments, "all")
    output, files = _output(config), prompts_of(config)
    tracing.check(config.job.trace, lambda: files_of_run(config))
    check_exports(config)
    num_rows = count(files)
    with contextlib.closing(open_model(config, "float32")) as checkpoint, template_helper() as helper:
        shape = checkpoint.shape
        name = config.model or config.job.random_weights
        _say("model", f"{name}: {shape.family}, {plural(shape.num_layers, 'layer')}, vocabulary {shape.vocab_size:,},"
             f" context {shape.max_positions:,}")  # fmt: skip
        tokenizer = tokenizer_of(checkpoint)
        chat = Chat(checkpoint.tokenizer, tokenizer.special_tokens, datetime.now(), helper)
        for doubt in [*checkpoint.notes, *doubts(tokenizer, chat, shape.vocab_size)]:
            _say("note", doubt)
        by_model = taken(checkpoint.generation_config, config.sampling)
        for line in told(checkpoint.generation_config, config.sampling, by_model):
            _say("note", line)
        sampling = settled(replace(config.sampling, **by_model), checkpoint, tokenizer, {})
        check_constraint(config.sampling, sampling, tokenizer, shape.vocab_size)
        encoder = Encoder(tokenizer, chat, config.sampling, shape.vocab_size, lambda message: _say("note", message))
        limits = ModelLimits(shape.max_positions, shape.vocab_size, end_words=shape.end_words)
        rows = shard_rows(config.job.shard, num_rows)
        prompts = noted(open_prompts(files), lambda message: _say("note", message))
        found = findings_of(prompts, rows, encoder, sampling, limits, tokenizer, 2**62 if arguments.all else SHOWN)
    _report(config, found, output)
    return _verdict(config, found)


def _output(config: Config) -> str:
    """What lies at the output's place, which is left as it is. Raises InputError if the run could not write there."""
    path = Path(config.output)
    if path.is_dir():
        raise InputError(f"output {path} is a folder: name a file, such as {path / 'run.h5'}")
    check_file(path)
    check_names(path)
    if path.exists():
        with Looker() as looker, open_generations(path, looker) as file:
            return f"exists, with {plural(len(file), 'row')}"
    parts = part_files(parts_folder(path))
    return f"begun, {plural(len(parts), 'part')}: the run will continue it" if parts else "to be made"


def _report(config: Config, found: Findings, output: str) -> None:
    _say("prompts", f"{prompts_of(config)}: {plural(found.num_rows, 'row')}, {found.num_wrong:,} wrong")
    longest = f" (longest {found.longest:,}, row {found.longest_row})" if found.longest else ""
    _say("tokens", f"{plural(found.num_tokens, 'prompt token')}{longest}, at most {found.num_new:,} new ones")
    needed, free = _space(config, found)
    _say("output", f"{config.output}: {output}; at most {_size(needed)}, {_size(free)} free")
    for path, format in exports_of(config):
        _say("export", f"{path}: {'rows' if format == 'rows' else 'responses'}, when the output is whole")
    for row, id, error in found.wrong:
        name = f" ({id})" if id != str(row) else ""
        _say(f"row {row}", f"{error}{name}")
    if found.num_wrong > len(found.wrong):
        _say("", f"and {plural(found.num_wrong - len(found.wrong), 'other row')} (--all lists them)")
        for line in found.reasons.lines():
            _say("", line)


def _verdict(config: Config, found: Findings) -> int:
    needed, free = _space(config, found)
    wrong = []
    if found.num_wrong:
        wrong.append(
            f"{found.num_wrong:,} of {plural(found.num_rows, 'row')} of {prompts_of(config)} would end with an error"
        )
    if needed > free:
        wrong.append(
            f"output {config.output} may need {_size(needed)}, its folder has {_size(free)} free:"
            " name another folder or lower max_new_tokens"
        )
    if wrong:
        raise InputError("; ".join(wrong))
    nothing = f"warning: {prompts_of(config)} has no rows" if found.num_rows == 0 else "nothing is wrong"
    _say("", nothing)
    return 0


def _space(config: Config, found: Findings) -> tuple[int, int]:
    """Bytes that the run may write, parts and the output that they are merged into, and those that are free."""
    space = os.statvfs(Path(config.output).parent)
    return 2 * found.nbytes, space.f_bavail * space.f_frsize


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.2f} MiB"


def _say(name: str, message: str) -> None:
    sys.stdout.write(f"{name:<12}{printable(message)}\n" if name else f"{printable(message)}\n")
