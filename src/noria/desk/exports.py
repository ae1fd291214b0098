"""The files that a run exports its output to when it is whole: what cannot be written is refused before the run begins.

An export that fails then costs itself alone: the output stays as it is.
"""

import contextlib
import json
import os
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

from noria.config import Config
from noria.desk.inputs import files_of_run, prompts_of
from noria.desk.token_texts import NO_MODEL, token_texts
from noria.errors import InputError, require
from noria.job import OPENAI
from noria.output.export import ExportSettings, check_target, export
from noria.output.generations import open_generations
from noria.output.sealed import part_files, parts_folder
from noria.output.segments import read_segments, segments_of
from noria.rows.prompt_files import content_hash, content_key
from noria.tools.looking import Looker
from noria.tools.text import plural, printable
from noria.tools.values import WHOLE, parse_shard


def exports_of(config: Config) -> Iterator[tuple[Path, str]]:
    """The files that a run exports to, and the format of each."""
    for name in config.job.export or []:
        yield Path(name.removeprefix(OPENAI)), "openai" if name.startswith(OPENAI) else "rows"


def check_exports(config: Config) -> None:
    """Raises InputError for an export that could not be written, or not without the loss of another file of the run."""
    ours = filter(None, [*files_of_run(config), config.job.trace])
    taken = {os.path.realpath(file): f"a file of this run ({file})" for file in ours}
    for name in config.job.export or []:
        check_prefix(name.removeprefix(OPENAI), f"job.export {name}")
    _check_shard(config)
    for path, format in exports_of(config):
        found = "is a link: name the file itself" if path.is_symlink() else _found(path, taken)
        if os.path.realpath(path.parent) == os.path.realpath(parts_folder(config.output)):
            found = "lies in the folder of the output's parts, which is removed: name another folder"
        require(found is None, f"job.export {path} {found}")
        try:
            check_target(path, format)
        except InputError as error:
            raise InputError(f"job.export {error}") from error
        taken[os.path.realpath(path)] = "another export of this run"


def check_prefix(name: str, what: str) -> None:
    """Raises InputError for a name such as vllm:FILE, which is meant as a format that there is not; not for a path."""
    prefix, colon, _ = name.partition(":")
    unknown = colon and re.fullmatch(r"[A-Za-z]\w*", prefix) and not ("/" in name and Path(name).parent.is_dir())
    require(
        not unknown, f"{what}: there is no format {prefix!r} (known: {OPENAI}FILE); a file of that name is ./{name}"
    )


def _check_shard(config: Config) -> None:
    """Raises InputError for an export that has no shard's number in its name: the other shards would write the same file."""
    i, n = parse_shard(config.job.shard or WHOLE)
    for path, _ in exports_of(config) if n > 1 else ():
        own = any(int(number) == i for number in re.findall(r"\d+", str(path)))
        name, dot, ending = path.name.partition(".")
        require(
            own,
            f"job.export {path} is not of shard {i}/{n} alone, each of the {n} would write it: name a file with the shard's"
            f" number, such as {path.with_name(f'{name}.{i}{dot}{ending}')}, or export what noria merge makes of them",
        )


def _found(path: Path, taken: dict[str, str]) -> str | None:
    """In words, whose file lies there already."""
    same = (what for file, what in taken.items() if file == os.path.realpath(path) or _are_one(path, file))
    return next((f"is {what}: name a file of its own" for what in same), None)


def _are_one(path: Path, file: str) -> bool:
    """Whether two names lead to one file: hard links do."""
    try:
        return os.path.samefile(path, file)
    except OSError:
        return False


def write_exports(config: Config, say: Callable[[str], None]) -> None:
    """Writes the exports of an output that is whole. What one of them meets is said, with the command that makes it again."""
    for path, format in exports_of(config):
        try:
            settings = ExportSettings(format, texts=token_texts(config.model or NO_MODEL))
            count = export(config.output, path, say, settings=settings)
            say(f"export: {path}, {plural(count, 'row' if format == 'rows' else 'response')}")
        except Exception as error:  # noqa: BLE001 - whatever it is, the output is whole and stays so
            reason = str(error) if isinstance(error, InputError | OSError) else f"{type(error).__name__}: {error}"
            more = [] if format == "rows" else ["--format", format]
            again = shlex.join(["noria", "export", config.output, str(path), *more])
            say(
                f"error: {config.output} is whole, but its export was not written ({printable(reason)}); again: {again}"
            )


def paths_of_prompts(config: Config) -> list[str]:
    """The files that a run's prompts come from, as its segment tells them."""
    return [os.path.abspath(path) for path in prompts_of(config).paths]


def check_not_prompts(output: Path, target: Path, prompts: str | None = None) -> None:
    """Raises InputError if the file to write is one that the run's prompts come from, which would be lost, whatever it holds
    by now, or holds the same. `prompts`: what tells them from others (rows.prompt_files.content_key), if that is known; else
    the output is asked."""
    if not target.is_file():
        return
    segments = read_segments(parts_folder(output))
    with contextlib.suppress(InputError, OSError, LookupError, ValueError):  # export says what is wrong with the output
        first = output if output.exists() else part_files(parts_folder(output))[0]
        with Looker() as looker, open_generations(first, looker) as file:
            prompts = prompts or str(json.loads(file.attrs["header"])["prompts"])
            segments += [{"prompts": [one["file"] for one in json.loads(file.attrs.get("prompt_files", "[]"))]}]
            segments += segments_of(file.attrs)
    files = {Path(str(path)).resolve() for one in segments for path in one.get("prompts") or ()}
    same_size = prompts is not None and prompts.endswith(f" of {target.stat().st_size} bytes")
    if target.resolve() in files or (same_size and prompts == content_key(target, content_hash(target))):
        raise InputError(f"{target} holds the prompts of {output}, which would be lost: name another file")
