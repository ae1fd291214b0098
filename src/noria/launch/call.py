"""`noria.generate`: a run as a call of a Python program. The run itself is always a child process, which MPI and the GPU are
left to: a program or a notebook may call again and again, and is none of its ranks.
"""

import contextlib
import os
import shutil
import sys
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from noria import config
from noria.errors import InputError, require
from noria.launch.child import ChildEnd, command, run_child
from noria.output import opened
from noria.output.opened import Output
from noria.output.outcome import ROWS_IN_ERROR
from noria.rows.from_python import write_prompts
from noria.tools.keys import nearest, types_of

STOPPED = 75  # launch/stopping.py, which this process does not need


class Stopped(RuntimeError):
    """The run stopped before its end: by its walltime, a signal or a stop file. The same call with the same output continues
    it; `noria.open` has the rows that are finished."""


def generate(
    model: str | os.PathLike[str] | None,
    prompts: Iterable[Any] | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    ranks: int = 1,
    **settings: Any,
) -> Output:
    """Generates as `noria run` does, in a child process, and returns the output, open.

    `model`: checkpoint made by noria convert (None with random_weights="config.json"). `prompts`: a list, a column or a
    table (of pandas, polars, datasets or Arrow) of texts, rows (dicts), conversations (lists of messages) or lists of token
    ids; a pathlib.Path is a file of prompts. `output`: file for the generations; the same call continues it if it is not
    finished. Without one the rows live in a temporary file as long as what is returned. `ranks`: more than one are started
    with mpirun. `settings`: the keys of a run (`noria help keys`): max_new_tokens=64, weights={"gpu": 40, "cpu": 60}.

    What the run says goes to stderr. Ctrl-C stops it in order: finished rows are sealed. Raises InputError for wrong input,
    Stopped, RuntimeError for any other failure.
    """
    require(type(ranks) is int and ranks >= 1, f"ranks is {ranks!r}: it must be an integer from 1")
    _check_names(settings)
    with _folder() as folder, _output(output) as path:
        files = {"output": str(path)} | ({} if model is None else {"model": os.fspath(model)})
        if isinstance(prompts, os.PathLike):
            files["prompts"] = os.fspath(prompts)
        else:
            files["prompts"] = str(folder / "prompts.jsonl")
        run = config.load(
            None, files | {name: _setting(value) for name, value in settings.items() if value is not None}
        )
        if not isinstance(prompts, os.PathLike):
            write_prompts(prompts, folder / "prompts.jsonl")
        (folder / "run.toml").write_text(run.to_toml(), encoding="utf-8")
        ended = run_child(command(ranks, "run", str(folder / "run.toml")), _say)
        _check(ended, path, run.job.fail_on_errors, named=output is not None)
        rows = opened.open(path)
        if output is None:
            rows.held = _Held(path.parent)
        return rows


def _check_names(settings: Iterable[str]) -> None:
    kinds = (config.Config, *config.SECTIONS.values())
    known = {name for kind in kinds for name in types_of(kind)} - {"model", "prompts", "output", *config.SECTIONS}
    for name in settings:
        require(name in known, f"unknown setting {name}{nearest(name, known)} (noria help keys lists all)")


def _check(ended: ChildEnd, path: Path, fail_on_errors: bool, named: bool) -> None:
    """Raises what a run's end means, but for one that leaves a whole output."""
    if ended.interrupted:
        raise KeyboardInterrupt(_goes_on(path, named))
    if ended.code == STOPPED:
        raise Stopped(f"the run stopped before its end: {_goes_on(path, named)}")
    if ended.code == 2:
        raise InputError(_reason(ended))
    if ended.code == ROWS_IN_ERROR and fail_on_errors:
        raise RuntimeError(
            f"{path}: rows are in error, and fail_on_errors is set; noria.open({str(path)!r}) has all rows"
        )
    if ended.code not in (0, ROWS_IN_ERROR):
        raise RuntimeError(f"noria run failed with exit code {ended.code}: {_reason(ended)}")


def _goes_on(path: Path, named: bool) -> str:
    again = "the same call continues it" if named else f"the same call with output={str(path)!r} continues it"
    return f"{again}; noria.open({str(path)!r}) has the rows that are finished"


def _reason(ended: ChildEnd) -> str:
    """The line of the run that says why it failed."""
    lines = [line.removeprefix("noria: ") for line in ended.said if line.startswith("noria: ")]
    return lines[-1] if lines else "\n".join(ended.said[-10:])


def _setting(value: Any) -> Any:
    """A setting as TOML has it."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {str(name): _setting(one) for name, one in value.items()}
    return [_setting(one) for one in value] if isinstance(value, list | tuple) else value


def _say(text: str) -> None:
    stream = sys.stderr
    if stream is not None:
        stream.write(text)
        stream.flush()


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    """For the prompts and the run file of one call."""
    with tempfile.TemporaryDirectory(prefix="noria-call-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@contextlib.contextmanager
def _output(named: str | os.PathLike[str] | None) -> Iterator[Path]:
    """Where the output goes. A folder of its own goes away after wrong input; rows that are sealed in it stay."""
    if named is not None:
        yield Path(named)
        return
    folder = Path(tempfile.mkdtemp(prefix="noria-output-"))
    try:
        yield folder / "run.h5"
    except BaseException:
        with contextlib.suppress(OSError):
            folder.rmdir()  # not if a run left rows in it
        raise


class _Held:
    """A folder that is deleted with this object, or at the end of the program."""

    def __init__(self, folder: Path):
        weakref.finalize(self, shutil.rmtree, folder, True)
