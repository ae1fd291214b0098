"""The place of an output: what lies there before a run, and how an old one is moved aside.

Knows the names of outputs and parts; reads of them only what kind of file they are.
"""

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

from noria.errors import InputError
from noria.output.access import hindrance
from noria.output.generations import NewerVersion, open_generations
from noria.output.parts import own_files, remove_parts
from noria.output.sealed import part_files, parts_folder, scan
from noria.output.segments import restore
from noria.tools.atomic import check_file, fsync, real, replacing
from noria.tools.looking import Looker
from noria.tools.trailer import agrees
from noria.tools.writing import writing


def probe_output(path: str | Path, overwrite: bool = False, move: bool = True) -> str:
    """What lies at `path` before a run: "absent", "finished", or "parts" of a run that can be resumed.

    Cheap: made to be asked before the model is loaded. With `overwrite` an old output and its parts are moved aside to
    `NAME.h5.old-N` (and `NAME.h5.old-N.parts`) if they may `move` yet, and the answer is "absent". Raises InputError for
    a folder that is missing or cannot be written, a file that is not a Noria output (with `overwrite` too: it may be a
    mistyped path), a newer version, parts that this user may not read or add to.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"output {path} is a folder: name a file, such as {path / 'run.h5'}")
    check_file(path)
    folder = parts_folder(path)
    if folder.is_symlink() and not folder.exists():
        raise InputError(
            f"output {path}: {folder} is a link to a folder that is not there: make it, or remove the link"
        )
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output {path}: {folder} is a file, but the parts go to a folder of that name: move it away")
    if not overwrite and (found := hindrance(path)) is not None:
        raise InputError(f"output {path}: {found}, or name another output")
    header = _finished_header(path, overwrite)
    if overwrite:
        if move:
            _move_aside(path)
        return "absent"
    if header is not None:
        _finish_removal(path, header)
        return "finished"
    return "parts" if part_files(folder) else "absent"


def begun_with(path: str | Path) -> dict[str, Any] | None:
    """The header of what lies at an output's place, finished or not; None if nothing does that can be read."""
    path = Path(path)
    for file in filter(Path.is_file, [path, *part_files(parts_folder(path))]):  # a pipe would wait for its writer
        try:
            with Looker() as looker, open_generations(file, None if agrees(file) else looker) as opened:
                header = json.loads(opened.attrs.get("header", "{}"))
        except (InputError, OSError, ValueError, RecursionError):
            continue
        if isinstance(header, dict):
            return header
    return None


def reopen(path: str | Path) -> None:
    """Makes a finished output the first part of a run that goes on: longer prompts, or errors that are tried again.

    Raises InputError if parts of another run lie there, WriteError if the disk is full: then all is as it was.
    """
    path = real(path)
    folder = parts_folder(path)
    if part_files(folder):
        raise InputError(f"output {path} is finished, and {folder} holds parts of another run: move that folder away")
    try:
        with writing(folder):
            folder.mkdir(exist_ok=True)
        with open_generations(path) as file:
            restore(folder, file.attrs)
        _move(path, folder / "part-000000.h5")
    except OSError:
        remove_parts(path)  # the output is whole, and nothing else is in there
        raise
    fsync(folder)
    fsync(path.parent)


def _move(path: Path, target: Path) -> None:
    """Gives a file another name, in another file system too, where the folder of parts is a link to one."""
    try:
        os.rename(path, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        with replacing(target) as copy:
            shutil.copyfile(path, copy)
        path.unlink()


def _finished_header(path: Path, overwrite: bool) -> object:
    """The header of the finished output at `path`, or None if nothing is there."""
    if not path.exists():
        return None
    try:
        with Looker() as looker, open_generations(path, looker) as file:
            if not file.complete:
                raise InputError(f"output {path} is a part of an unfinished output: name another file, or move it away")
            return file.attrs.get("header", "")
    except NewerVersion:
        if overwrite:
            return ""
        raise
    except InputError as error:
        raise InputError(f"output {error}: name another file, or move it away") from error


def _finish_removal(path: Path, header: object) -> None:
    # A job was killed between naming its output and deleting its parts. Parts of another run are left alone.
    folder = parts_folder(path)
    parts = scan(folder, report=lambda message: None, verify=False)
    if not folder.exists() or (parts and all(json.dumps(part.header) == header for part in parts)):
        remove_parts(path)


def _move_aside(path: Path) -> None:
    path = real(path)
    folder, number = parts_folder(path), 1
    held = bool(own_files(folder))  # else the folder, perhaps a link, serves the next run as well
    if not path.exists() and not held:
        return
    while any(os.path.lexists(place) for place in _aside(path, number)):
        number += 1
    aside, parts_aside = _aside(path, number)
    if held:
        os.rename(folder, parts_aside)
    if path.exists():
        os.rename(path, aside)
    fsync(path.parent)


def _aside(path: Path, number: int) -> tuple[Path, Path]:
    """The names of an old output and of its parts."""
    name = f"{path.name}.old-{number}"
    return path.with_name(name), path.with_name(f"{name}.parts")
