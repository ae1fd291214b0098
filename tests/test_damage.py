"""Damaged HDF5 files: nothing hangs, nothing ends in a traceback, every message names the file, and what is served as right
is what was written."""

import contextlib
import io
import json
import os
import random
import signal
import time
import traceback
from pathlib import Path
from select import select as readable

import h5py
import numpy as np
import pytest

import test_tokenizer
import tiny_models
from counts import count, full
from noria.__main__ import main
from noria.checkpoint.checkpoint import open_checkpoint
from noria.checkpoint.convert import convert
from noria.errors import InputError
from noria.output.merge import merge
from noria.output.parts import Parts
from noria.output.sealed import gather, part_files, parts_folder, select
from noria.tools import looking
from noria.tools.trailer import agrees
from output_rows import as_tuple, fill, make_row

HEADER = {"prompts": "a", "sampling.max_new_tokens": 64}
ROWS = 30
LIMIT_SECONDS = 20 if full() else 60  # the other tests run beside it


# ---- what is damaged, and what reads it: (name of the reader, code, words); a third is whether what it serves is right


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with a checkpoint, an output, a folder of parts and prompts, all whole."""
    folder = tmp_path_factory.mktemp("whole")
    config = tiny_models.LLAMA | {"num_hidden_layers": 2, "vocab_size": 400}
    tiny_models.write_directory(folder / "hf", config, tiny_models.state(config))
    for name, content in test_tokenizer.files_of(test_tokenizer.byte_level_with_bos()).items():
        (folder / "hf" / name).write_bytes(content)
    convert(folder / "hf", folder / "model.h5")
    rows = [make_row(row, status="error" if row % 9 == 8 else "done", logprobs=True) for row in range(ROWS)]
    parts = Parts(folder / "out.h5", HEADER)
    fill(parts, rows, 8)
    merge(parts, folder / "out.h5", ROWS, {"run_file": "model = 1\n" * 40}, {"seconds": {"busy": [1.5, 2.5]}})
    fill(Parts(folder / "half.h5", HEADER), [*rows[:20], make_row(21, status="todo", num_tokens=5)], 7)
    with h5py.File(folder / "prompts.h5", "w") as file:
        file["prompt"] = [f"prompt {row} é" * (1 + row % 5) for row in range(ROWS)]
        file.create_dataset("label", data=np.arange(ROWS), chunks=(8,), compression="gzip")
        file.create_dataset("tags", data=[f"tag {row}" for row in range(ROWS)], chunks=(8,), dtype=h5py.string_dtype())
        file.create_dataset("few", (ROWS,), h5py.vlen_dtype(np.int32))
        for row in range(ROWS):
            file["few"][row] = np.arange(row % 4, dtype=np.int32)
    return folder


def read_output(path, folder):
    yield from command("inspect", path)
    yield from command("inspect", path, "--verify")
    target = folder / "rows.jsonl"
    for reader, code, words, _ in command("export", path, target):
        yield reader, code, words, code != 0 or target.read_bytes() == (folder / "right.jsonl").read_bytes()


def read_checkpoint(path, folder):
    yield from command("inspect", path)
    yield from command("inspect", path, "--verify")
    right = json.loads((folder / "right.json").read_text())
    try:
        with open_checkpoint(path) as file:
            blocks = {}
            for name, block in file.blocks.items():
                content = bytearray(block.nbytes)
                file.read_block(name, content)
                blocks[name] = content.hex()
        yield "blocks", 0, "", [file.header_hash, blocks] == right
    except InputError as error:
        yield "blocks", 2, f"{error}\n", True


def read_prompts(path, folder):
    model = ["--model", folder / "model.h5", "--device", "cpu", "--output", folder / "never.h5"]
    yield from command("validate", *model, "--prompts", path)


def read_parts(path, folder):
    """As a run does that goes on. What is left out is told by name; every row that is there is the one that was sealed."""
    told = []
    parts = Parts(path, HEADER, report=told.append)
    rows = {(row.row, row.sample): row for block in gather(parts.parts, select(parts.parts)) for row in block}
    found = [as_tuple(row) for row in (*rows.values(), *parts.unfinished().values())]
    right = {tuple(map(_frozen, row)) for row in json.loads((folder / "right_rows.json").read_text())}
    ours = all(tuple(map(_frozen, row)) in right for row in found)
    lost = len(found) < len(right)
    names = all(".parts/part-" in line and line.count("\n") == 0 for line in told) and (told or not lost)
    yield "resume", 0 if names else 1, "\n".join(told), ours
    yield from command("inspect", path)
    for reader, code, words, _ in command("export", path, folder / "rows.jsonl"):
        lines = (folder / "rows.jsonl").read_text().splitlines() if code == 0 else []
        yield reader, code, words, set(lines) <= set((folder / "right_lines.jsonl").read_text().splitlines())


def _frozen(value):
    return json.dumps(value)


def command(name, path, *more):
    """What a command of Noria says of a file, in this process: a code of 1 stands for a traceback."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main([name, *map(str, (path, *more))])
        except Exception:  # noqa: BLE001 - what is looked for
            err.write(traceback.format_exc())
            code = 1
    words = err.getvalue()
    yield " ".join([name, *(one for one in map(str, more) if one == "--verify")]), code, words, True


KINDS = {
    "output": ("out.h5", read_output),
    "checkpoint": ("model.h5", read_checkpoint),
    "prompts": ("prompts.h5", read_prompts),
    "part": ("half.h5", read_parts),
    "part without a checksum": ("half.h5", read_parts),
}


# ---- damages


def damaged(content, draw):
    """The bytes of a file after something that disks, copies and networks do to them."""
    content, size = bytearray(content), len(content)
    sector = 512 * draw.randrange(max(size // 512, 1))
    other = 512 * draw.randrange(max(size // 512, 1))
    kind = draw.choice(["flips", "zeros", "ones", "cut", "swapped", "doubled"])
    if kind == "flips":
        for _ in range(draw.choice([1, 1, 2, 8])):
            content[draw.randrange(size)] ^= 1 << draw.randrange(8)
    elif kind == "zeros":
        content[sector : sector + 512] = bytes(len(content[sector : sector + 512]))
    elif kind == "ones":
        begin, length = draw.randrange(size), draw.choice([1, 2, 4, 8, 64, 512])
        content[begin : begin + length] = b"\xff" * len(content[begin : begin + length])
    elif kind == "cut":
        del content[draw.randrange(size) :]
    elif kind == "swapped":
        content[sector : sector + 512], content[other : other + 512] = (
            content[other : other + 512],
            content[sector : sector + 512],
        )
    else:
        content[sector:sector] = content[sector : sector + 512]
    return bytes(content)


def place_damage(kind, whole, folder, draw):
    """A damaged file of this kind in the folder, and the path by which it is read."""
    name, _ = KINDS[kind]
    if not kind.startswith("part"):
        (folder / name).write_bytes(damaged((whole / name).read_bytes(), draw))
        return folder / name
    parts = parts_folder(folder / name)
    parts.mkdir(exist_ok=True)
    sources = part_files(parts_folder(whole / name))
    one = draw.randrange(len(sources))
    for number, source in enumerate(sources):
        content = source.read_bytes()
        if kind != "part":
            content = content[:-40]
        (parts / source.name).write_bytes(damaged(content, draw) if number == one else content)
    return folder / name


# ---- trials in a process of their own


def trial(kind, path, folder):
    """What each reader said, in a forked process; the last one is `hang` or `crash` if there it ended so."""
    receiving, sending = os.pipe()
    child = os.fork()
    if child == 0:
        looking.Looker.close = lambda self: None  # one child for all readers: their starts are not what is tested
        try:
            for said in KINDS[kind][1](path, folder):
                os.write(sending, (json.dumps(said) + "\n").encode())
        except BaseException:  # noqa: BLE001 - all there is must come to the parent
            os.write(sending, (json.dumps(["trial", 1, traceback.format_exc(), True]) + "\n").encode())
        finally:
            os._exit(0)
    os.close(sending)
    lines, rest, until = [], b"", time.monotonic() + LIMIT_SECONDS
    while readable([receiving], [], [], max(until - time.monotonic(), 0))[0]:
        piece = os.read(receiving, 2**16)
        if not piece:
            break
        until = time.monotonic() + LIMIT_SECONDS
        rest += piece
        lines += rest.split(b"\n")[:-1]
        rest = rest.rpartition(b"\n")[2]
    else:
        lines.append(json.dumps(["hang", 1, "", True]).encode())
        os.kill(child, signal.SIGKILL)
    os.close(receiving)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) != signal.SIGKILL:
        lines.append(json.dumps(["crash", 1, f"signal {os.WTERMSIG(status)}", True]).encode())
    return [json.loads(line) for line in lines]


def wrong_with(said, path):
    """What is wrong with a reader's answer, in a word; nothing for a right one."""
    reader, code, words, right = said
    if reader in ("hang", "crash"):
        return reader
    if "Traceback" in words or code not in (0, 2, 65):
        return "traceback"
    if not right:
        return "wrong rows or blocks"
    if code == 2 and (path.name not in words or words.count("\n") != 1):
        return "message without the name"
    return ""


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_no_damage_hangs_or_ends_in_a_traceback_and_what_is_served_is_right(kind, whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare(whole, tmp_path)
    counts, examples = {}, []
    for number in range(count(200)):
        draw = random.Random(f"{kind} {number}")
        path = place_damage(kind, whole, tmp_path, draw)
        answers = trial(kind, path, tmp_path)
        for said in answers:
            wrong = wrong_with(said, path)
            word = wrong or ("refused" if said[1] == 2 else "read")
            counts[word] = counts.get(word, 0) + 1
            examples += [(number, wrong, said)] if wrong else []
    print(kind, counts)
    assert not examples, (counts, examples[:5])
    assert counts.get("refused", 0) + counts.get("read", 0) >= count(200)


def prepare(whole, folder):
    """What whole files give, for comparison."""
    assert main(["export", str(whole / "out.h5"), str(folder / "right.jsonl")]) == 0
    assert main(["export", str(whole / "half.h5"), str(folder / "right_lines.jsonl")]) == 0
    rows = [make_row(row, status="error" if row % 9 == 8 else "done", logprobs=True) for row in range(ROWS)]
    rows = [*rows[:20], make_row(21, status="todo", num_tokens=5)]
    (folder / "right_rows.json").write_text(json.dumps([as_tuple(row) for row in rows]))
    if not (folder / "model.h5").exists():
        (folder / "model.h5").write_bytes((whole / "model.h5").read_bytes())
    with open_checkpoint(whole / "model.h5") as file:
        blocks = {}
        for name, block in file.blocks.items():
            content = bytearray(block.nbytes)
            file.read_block(name, content)
            blocks[name] = content.hex()
        (folder / "right.json").write_text(json.dumps([file.header_hash, blocks]))


def test_the_readers_of_damages_find_nothing_wrong_with_whole_files(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare(whole, tmp_path)
    assert agrees(whole / "model.h5") and all(agrees(part) for part in part_files(parts_folder(whole / "half.h5")))
    for kind, (name, _) in KINDS.items():
        for said in trial(kind, whole / name, tmp_path):
            assert not wrong_with(said, Path(name)) and said[1] == 0, (kind, said)
