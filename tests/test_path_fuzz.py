"""Every command under paths that are no paths and terminals that are not UTF-8: one line, no traceback, no hang."""

import io
import os
import random
import stat
import sys
from pathlib import Path

import pytest

import small_run
from counts import count
from noria.__main__ import COMMANDS, main
from noria.launch.watchdog import Watchdog

CASES = 300  # of each command
NAMES = [
    "",
    ".",
    "..",
    "/",
    "//",
    "./",
    "a/..",
    "a/",
    "-",
    "--",
    "~",
    " ",
    "*",
    "nothing",
    "no/folder/x.h5",
    "a" * 300,
    "b/" * 3000,
]
NAMES += [
    "prömpt.jsonl",
    "\udcff.h5",
    "line\nbreak.h5",
    "\x1b[31m.h5",
    "日本.h5",
    "\U0001f3a1.jsonl",
    "nul\0.h5",
    "a.jsonl.gz",
    ".h5",
]
NAMES += [
    "model.h5/x.h5",
    "model.h5/",
    "model.h5",
    "prompts.jsonl",
    "run.h5",
    "hf",
    "hf/config.json",
    "empty",
    "text.h5",
    "pipe",
    "loop",
]
NAMES += [
    "dangling",
    "null",
    "full",
    "run.h5.parts",
    "file.parts",
    "out.jsonl",
    "out.csv",
    "out.txt",
    "ümlaut/x.h5",
    "run.toml",
    "zero.h5",
]
ENCODINGS = ["ascii", "latin-1", "utf-8", "cp1252"]
# What takes the place of `PATH` is drawn; the other paths are right.
ARGUMENTS = {
    "convert": [["PATH", "new.h5"], ["hf", "PATH"], ["PATH", "PATH"], ["hf", "PATH", "--overwrite"]],
    "run": [
        ["PATH"],
        *(["run.toml", f"--{key}", "PATH"] for key in ("model", "prompts", "output", "scratch", "machine", "trace")),
    ],
    "validate": [["PATH"], *(["run.toml", f"--{key}", "PATH"] for key in ("model", "prompts", "output"))],
    "plan": [
        ["PATH", "--ranks", "1"],
        *(["run.toml", "--ranks", "1", f"--{key}", "PATH"] for key in ("model", "prompts", "machine")),
    ],
    "probe": [["--output", "PATH"], ["--scratch", "PATH"]],
    "inspect": [["PATH"], ["PATH", "--verify"], ["PATH", "--all", "--json"], ["--run", "PATH"]],
    "export": [["PATH", "new.jsonl"], ["run.h5", "PATH"], ["PATH", "PATH"]],
    "report": [["PATH"], ["run.h5", "--html", "PATH"], ["PATH", "--html", "new.html"]],
    "merge": [["PATH", "run.h5"], ["new.h5", "PATH"], ["PATH", "PATH", "PATH"]],
}
MORE = {"probe": ["--device", "cpu", "--seconds", "0.001", "--megabytes", "1"]}
RUN_FILE = """
model = "model.h5"
prompts = "prompts.jsonl"
output = "out.h5"
device = "cpu"
[sampling]
max_new_tokens = 1
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = small_run.write_files(tmp_path_factory.mktemp("paths"))
    assert main(small_run.command(folder, "run.h5")) == 0
    (folder / "run.toml").write_text(RUN_FILE)
    (folder / "prömpt.jsonl").write_text('{"prompt": "ü", "token_ids": [5, "日"]}\n')
    for name, content in {"empty": b"", "text.h5": b"text\n", "file.parts": b"", "zero.h5": bytes(4096)}.items():
        (folder / name).write_bytes(content)
    (folder / "run.h5.parts").mkdir(exist_ok=True)
    (folder / "ümlaut").mkdir()
    os.mkfifo(folder / "pipe")
    links = {"loop": "loop", "dangling": "no/where"}
    links |= {name: device(folder / f"{name}-device", minor) for name, minor in (("null", 3), ("full", 7))}
    for name, target in links.items():
        (folder / name).symlink_to(target)
    return folder


def device(path, minor):
    """A device like /dev/null or /dev/full that a fault may destroy; those themselves where only root may do either."""
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, minor))
    except PermissionError:
        return Path("/dev", path.name.removesuffix("-device"))
    return path


def said(argv, encoding):
    """(exit code, what was written) of a command in this process, on a terminal of this encoding."""
    streams = [
        io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors=errors) for errors in ("strict", "backslashreplace")
    ]
    before, (sys.stdout, sys.stderr) = (sys.stdout, sys.stderr), streams
    try:
        code = main(argv)
    except SystemExit as leaving:
        code = leaving.code
    finally:
        sys.stdout, sys.stderr = before
    for stream in streams:
        stream.flush()
    return code, b"".join(stream.buffer.getvalue() for stream in streams).decode(encoding)


def cases(command):
    draw = random.Random(command)
    for _ in range(count(CASES)):
        argv = [draw.choice(NAMES) if one == "PATH" else one for one in draw.choice(ARGUMENTS[command])]
        encoding = draw.choice(ENCODINGS)
        if not (
            "pipe" in argv and (argv[0] == "pipe" or "--machine" in argv or command == "probe")
        ):  # may be of <(...)
            yield [command, *argv, *MORE.get(command, [])], encoding


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_any_path_and_any_encoding_ends_in_words(folder, monkeypatch, command):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(Watchdog, "__enter__", lambda self: self)  # its hooks are the process's
    monkeypatch.setattr(Watchdog, "__exit__", lambda *_: None)
    kept = {name: (folder / name).read_bytes() for name in ("run.h5", "model.h5", "prompts.jsonl", "run.toml")}
    for argv, encoding in cases(command):
        code, text = said(argv, encoding)
        assert code in (0, 1, 2, 65, 75), (argv, encoding, code)
        assert "Traceback" not in text and "Error:" not in text, (argv, encoding, text)
        assert code != 2 or text.count("noria: ") == 1, (argv, encoding, text)
        for name, content in kept.items():
            if (folder / name).read_bytes() != content:
                (folder / name).write_bytes(content)  # a right command may write over it; the next case is to find it
        assert (folder / "null").is_char_device() and (folder / "pipe").is_fifo(), (argv, encoding)
