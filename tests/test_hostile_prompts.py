"""Files that mean harm, on the side of prompts: exit code 2 or that row's error, in one line, and nothing is executed."""

import contextlib
import gzip
import io
import json
import os
import random
import resource
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from h5py import h5d, h5p, h5s, h5t
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import test_tokenizer
import tiny_models
from noria import config as configuration
from noria import kinds, readers
from noria.__main__ import main
from noria.checkpoint.convert import convert
from noria.errors import InputError
from noria.output.generations import open_generations
from noria.readers import hdf5
from noria.rows import template
from noria.rows.prompt_files import count
from noria.rows.prompts import open_prompts
from noria.rows.tokenizer import Tokenizer

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
GiB = 2**30


def model_of(folder, files, vocab_size=400):
    config = tiny_models.LLAMA | {"vocab_size": vocab_size}
    tiny_models.write_directory(folder / "hf", config, tiny_models.state(config))
    for name, content in files.items():
        (folder / "hf" / name).write_bytes(content)
    convert(folder / "hf", folder / "model.h5")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    files = test_tokenizer.files_of(test_tokenizer.byte_level_with_bos())
    return model_of(tmp_path_factory.mktemp("hostile"), files)


def peak_nbytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def refusal(capsys, *arguments):
    """The one line with which the command refuses."""
    capsys.readouterr()
    before = peak_nbytes()
    assert main([str(argument) for argument in arguments]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("noria: ") and said.err.count("\n") == 1 and len(said.err) < 700
    assert peak_nbytes() - before < GiB // 2
    return said.err


def generated(folder, prompts, *flags, model="model.h5"):
    """The rows of a run over these prompts, by row number."""
    output = folder / "out.h5"
    files = ["--model", folder / model, "--prompts", prompts, "--output", output, "--device", "cpu"]
    assert main(["run", *map(str, files), "--max-new-tokens", "2", *flags]) == 0
    with open_generations(output) as file:
        rows = {row.row: row for row in file.rows()}
    output.unlink()
    return rows


# Rows.

TEXTS = {
    "NUL": "a\0b",
    "lone surrogate": "a\ud83db",
    "emoji": "👩‍👩‍👧 🎉" * 3,
    "right to left": "\u202eabc\u202c שלום مرحبا",
    "line ends": "a\r\nb\u2028c\x85d\x0b",
    "controls": "\x1b[2J\x07\x9b",
    "special tokens": "</s><s> <|end|>",
    "formats": "%s %(a)s {0} {{ 7 * 7 }} {% for %} $(touch harm) `touch harm`",
}


def test_texts_of_any_characters_are_generated_from_with_exact_tokens(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"id": name, "prompt": text}) + "\n" for name, text in TEXTS.items()))
    backend = test_tokenizer.byte_level_with_bos()
    rows = generated(folder, path)
    for number, (name, text) in enumerate(TEXTS.items()):
        row = rows[number]
        assert (row.id, row.status) == (name, "done") and len(row.token_ids)
        stored = text.replace("\ud83d", "\ufffd")
        assert row.prompt_token_ids.tolist() == backend.encode(stored).ids, name
        assert row.prompt == stored.replace("\0", "\ufffd")
    assert os.listdir(tmp_path) == ["prompts.jsonl"]


@pytest.mark.slow
def test_a_row_of_a_megabyte_runs_where_the_context_holds_it_and_else_is_that_rows_error(folder, tmp_path):
    path = tmp_path / "prompts.jsonl"
    # 2^20 characters that are 60 tokens: a special token is one, however long.
    rows = [{"prompt": "the " * 2**18}, {"prompt": "the cat", "own": "x" * 2**20}, {"prompt": "dog"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second, third = generated(folder, path).values()
    assert first.status == "error" and "tokens, the model's context 64: shorten it" in first.error
    assert second.status == third.status == "done" and len(json.loads(second.extra)["own"]) == 2**20


BAD_ROWS = [
    ('{"prompt": "' + "x" * 100, "is not JSON"),
    ("[" * 100_000, "nested too deeply"),
    ('{"prompt": ' + "9" * 5000 + "}", "is not JSON"),
    ('{"token_ids": [' + "9" * 4000 + "]}", "must be an integer"),
    ('{"token_ids": [1e999]}', "token_ids[0] is inf"),
    ('{"prompt": "p", "temperature": ' + "9" * 400 + "}", "temperature"),
    ('{"prompt": "p", "max_new_tokens": 1e308}', "max_new_tokens is 1e+308"),
    ('{"prompt": "p", "seed": -1}', "seed is -1"),
    ('{"prompt": {"prompt": "p"}}', "prompt is {'prompt': 'p'}"),
    ('{"prompt": "p", "system": "\\ud800", "chat": true}', "no chat template"),
    ('{"messages": [[[[]]]]}', "messages[0] is [[[]]]"),
    ('{"messages": {"role": "user"}}', "it must be a list"),
    ('{"custom_id": "x", "body": "x"}', 'body is "x"'),
    ('{"prompt": "p", "stop": ["' + "x" * 10**6 + '"]}', "sampling.stop"),
    ('{"prompt": "p", "logit_bias": {"-1": 1}}', "logit_bias"),
    ('{"id": 1e400, "prompt": "p"}', "id is inf"),
]


def test_bad_rows_cost_no_other_row_its_result(folder, tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [line for bad, _ in BAD_ROWS for line in (bad, '{"prompt": "the cat"}')]
    path.write_bytes("\n".join(lines).encode() + b"\n\xff\xfe\n" + b"x" * (17 * 2**20) + b'\n{"prompt": "the cat"}\n')
    rows = generated(folder, path)
    assert len(rows) == len(lines) + 3
    for number, (_, words) in enumerate(BAD_ROWS):
        assert rows[2 * number].status == "error" and words in rows[2 * number].error, (words, rows[2 * number].error)
        assert len(rows[2 * number].error) <= 500
    assert "not UTF-8" in rows[len(lines)].error and "longer than 16 MiB" in rows[len(lines) + 1].error
    good = [rows[number] for number in [*range(1, len(lines), 2), len(lines) + 2]]
    assert {row.status for row in good} == {"done"} and len({tuple(row.token_ids) for row in good}) == 1


def test_logits_that_are_no_numbers_are_the_error_of_their_row_and_are_counted(tmp_path, capsys):
    state = tiny_models.state(tiny_models.LLAMA)
    state["model.embed_tokens.weight"][7] = float("nan")
    tiny_models.write_directory(tmp_path / "hf", tiny_models.LLAMA, state)
    convert(tmp_path / "hf", tmp_path / "model.h5")
    rows = [
        {"token_ids": [5, 6]},
        {"token_ids": [5, 7]},
        {"token_ids": [5, 7], "temperature": 1},
        {"token_ids": [5, 6]},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, greedy, sampled, last = generated(tmp_path, tmp_path / "p.jsonl").values()
    assert "2 with errors" in capsys.readouterr().err
    assert (first.status, last.status) == ("done", "done") and first.token_ids.tolist() == last.token_ids.tolist()
    for row in (greedy, sampled):
        assert row.status == row.finish_reason == "error" and "not finite" in row.error


# Files of prompts.


@pytest.mark.slow
def test_a_compressed_bomb_is_a_bad_row_in_little_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_LINE_NBYTES", 2**20)
    for name, piece in (
        ("line.jsonl.gz", b"x" * 2**20),
        ("text.txt.gz", b"y" * 2**20),
        ("open.csv.gz", b"a\n" * 2**19),
    ):
        path = tmp_path / name
        with gzip.open(path, "wb", compresslevel=1) as file:
            file.write(b'prompt\n"' if "csv" in name else b"")
            for _ in range(64):
                file.write(piece)
        assert path.stat().st_size < 2**20
        before = peak_nbytes()
        rows = list(open_prompts(path)) if "csv" not in name else [next(iter(open_prompts(path)))]
        assert len(rows) == 1 and "longer than 1 MiB" in rows[0].error
        assert peak_nbytes() - before < 2**25


def hdf5_with(path, shape, dtype, layout=None, chunks=None, external=None, name=b"prompt"):
    """An HDF5 file whose dataset claims this shape; nothing is written into it."""
    with h5py.File(path, "w") as file:
        create = h5p.create(h5p.DATASET_CREATE)
        if chunks:
            create.set_chunk(chunks)
            create.set_deflate(9)
        if external:
            create.set_external(external, 0, shape[0] * 8)
        if layout is not None:
            create.set_layout(layout)
        kind = h5t.py_create(dtype, logical=True)
        h5d.create(file.id, name, kind, h5s.create_simple(shape, tuple(shape)), create)
    return path


def absurd_rows(path):
    hdf5_with(path, (10**9,), h5py.string_dtype(), chunks=(2**16,))


def absurd_contiguous(path):
    hdf5_with(path, (10**12,), np.dtype("S8"))


def absurd_value(path):
    hdf5_with(path, (1,), np.dtype(f"S{2**30}"), chunks=(1,))


def absurd_chunk(path):
    with h5py.File(path, "w") as file:
        file.create_dataset("prompt", shape=(10,), maxshape=(None,), dtype="S64", chunks=(10**7,), compression="gzip")


def external_link(path):
    with h5py.File(path, "w") as file:
        file["prompt"] = h5py.ExternalLink("/etc/hostname.h5", "/x")


def soft_link(path):
    with h5py.File(path, "w") as file:
        file["prompt"] = h5py.SoftLink("/prompt")


def external_storage(path):
    hdf5_with(path, (2,), np.dtype("S8"), external=b"/etc/passwd")


def virtual(path):
    with h5py.File(path, "w") as file:
        layout = h5py.VirtualLayout((2,), "S8")
        layout[:] = h5py.VirtualSource("/etc/other.h5", "x", (2,))
        file.create_virtual_dataset("prompt", layout)


def two_dimensional(path):
    with h5py.File(path, "w") as file:
        file["prompt"] = np.zeros((3, 3), "S8")


def of_references(path):
    with h5py.File(path, "w") as file:
        file.create_dataset("prompt", (2,), h5py.ref_dtype)


def opaque(path):
    with h5py.File(path, "w") as file:
        file["prompt"] = np.zeros(2, np.dtype("V8"))


def ragged_lies(path):
    with h5py.File(path, "w") as file:
        file["tokens"], file["offsets"], file["label"] = [1, 2], [0, 1, 2], ["a", "b", "c"]


def ragged_text(path):
    with h5py.File(path, "w") as file:
        file["tokens"], file["offsets"] = [1.0], [0, 1]


def of_groups(path):
    with h5py.File(path, "w") as file:
        file["prompt/again"] = file["/"]


def half(path):
    with h5py.File(path, "w") as file:
        file["prompt"] = np.array([b"x" * 50] * 1000)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def text_file(path):
    path.write_text("prompt\n")


HDF5 = {
    absurd_rows: "says that it has 1000000000 values, the file holds 0",
    absurd_contiguous: "cannot hold",
    absurd_value: "a value has 1073741824 bytes",
    absurd_chunk: "is stored in chunks of 640000000 bytes",
    external_link: "'prompt' is a ExternalLink",
    soft_link: "'prompt' is a SoftLink",
    external_storage: "has its values in other files",
    virtual: "has its values in other files",
    two_dimensional: "a column has one value for each row",
    of_references: "columns are text or numbers",
    opaque: "columns are text or numbers",
    ragged_lies: "'label' has 3 values for 2 rows",
    ragged_text: "tokens and offsets must be integers",
    of_groups: "it needs a dataset prompt, or tokens with offsets",
    half: "cannot be read as HDF5",
    text_file: "cannot be read as HDF5",
}


@pytest.mark.parametrize("make", HDF5, ids=lambda make: make.__name__)
def test_a_hostile_hdf5_file_is_refused_in_one_line(make, folder, tmp_path, capsys):
    path = tmp_path / "prompts.h5"
    make(path)
    for command in ("validate",):
        line = refusal(
            capsys, command, "--model", folder / "model.h5", "--prompts", path, "--output", tmp_path / "out.h5"
        )
        assert HDF5[make] in line and "prompts.h5" in line
    assert sorted(os.listdir(tmp_path)) == ["prompts.h5"]


def test_an_output_is_not_taken_for_prompts(folder, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text('{"prompt": "the"}\n')
    arguments = [
        "--model",
        folder / "model.h5",
        "--output",
        tmp_path / "out.h5",
        "--device",
        "cpu",
        "--max-new-tokens",
        "1",
    ]
    assert main(["run", *map(str, arguments), "--prompts", str(tmp_path / "p.jsonl")]) == 0
    line = refusal(
        capsys, "validate", *arguments[:2], "--prompts", tmp_path / "out.h5", "--output", tmp_path / "two.h5"
    )
    assert "it holds generations; make prompts from it with noria export" in line


def lying_parquet(path):
    """A row count that is not that of the groups: the footer's own bytes, changed."""
    parquet.write_table(pyarrow.table({"prompt": ["a"] * 77}), path, compression="none", use_dictionary=False)
    content = path.read_bytes()
    length = struct.unpack("<i", content[-8:-4])[0]
    footer = content[-8 - length : -8]
    path.write_bytes(content[: -8 - length] + footer.replace(b"\x16\x9a\x01", b"\x16\x9a\x7f", 1) + content[-8:])


def long_footer(path):
    parquet.write_table(pyarrow.table({"prompt": ["a"]}), path)
    content = path.read_bytes()
    path.write_bytes(content[:-8] + struct.pack("<i", 2**31 - 1) + b"PAR1")


def parquet_bomb(path):
    parquet.write_table(pyarrow.table({"prompt": ["x" * 2**20] * 8}), path, compression="zstd", use_dictionary=False)


def no_prompt(path):
    parquet.write_table(pyarrow.table({"text": ["a"]}), path)


def not_parquet(path):
    path.write_bytes(b"PAR1" + b"\0" * 100)


PARQUET = {
    lying_parquet: "prompts.parquet",
    long_footer: "cannot be read as parquet",
    parquet_bomb: "write it with more groups",
    no_prompt: "no column prompt or messages or token_ids; it has: text",
    not_parquet: "cannot be read as parquet",
}


@pytest.mark.parametrize("make", PARQUET, ids=lambda make: make.__name__)
def test_a_hostile_parquet_file_is_refused_in_one_line(make, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(kinds.load("readers", "parquet"), "MAX_GROUP_NBYTES", 2**22)
    path = tmp_path / "prompts.parquet"
    make(path)
    line = refusal(capsys, "validate", "--model", folder / "model.h5", "--prompts", path, "--output", tmp_path / "o.h5")
    assert PARQUET[make] in line


@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts.csv", "prompts.h5", "prompts.parquet", "prompts.txt"])
def test_what_is_no_regular_file_is_refused_and_not_waited_for(folder, tmp_path, name, capsys):
    os.mkfifo(tmp_path / name)
    arguments = ["--model", folder / "model.h5", "--output", tmp_path / "o.h5"]
    assert "not a regular file" in refusal(capsys, "validate", *arguments, "--prompts", tmp_path / name)


# Run files.

TOML = {
    "nested": ("a = " + "[" * 100_000, "is not TOML"),
    "nested tables": ("a = " + "{b = " * 50_000, "is not TOML"),
    "long number": ("[sampling]\nseed = " + "9" * 100_000, "is not TOML"),
    "long key": ("x" * 200_000 + " = 1", "unknown key xxx"),
    "dotted": (".".join(["a"] * 100_000) + " = 1", "has a key of more than 1000 parts"),
    "dotted inside": ("a = {" + " . ".join(["a"] * 50_000) + " = 1}", "has a key of more than 1000 parts"),
    "large": ("#" * 2**21, "is longer than 262144 bytes"),
    "NUL": ("model = \0", "is not TOML"),
    "a date": ("model = 1979-05-27", "model is"),
    "inf": ("[sampling]\ntemperature = inf", "sampling.temperature is inf"),
    "escapes": ('"\\u001b[2J\\n" = 1', "unknown key"),
}


@pytest.mark.parametrize("name", TOML)
def test_a_hostile_run_file_is_refused_in_one_line(name, tmp_path, capsys):
    (tmp_path / "run.toml").write_text(TOML[name][0])
    line = refusal(capsys, "validate", tmp_path / "run.toml")
    assert TOML[name][1] in line and "\x1b" not in line


def test_a_run_file_without_an_end_is_refused(capsys):
    assert "is longer than" in refusal(capsys, "validate", "/dev/zero")


# Tokenizers and templates of a checkpoint.


def test_a_tokenizer_of_another_vocabulary_is_the_error_of_rows_whose_tokens_the_model_lacks(tmp_path):
    files = test_tokenizer.files_of(test_tokenizer.byte_level_with_bos())
    folder = model_of(tmp_path, files, vocab_size=300)
    say = Tokenizer(files, {}, {}).encode
    texts = ["the cat", "a", "b", "the"]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    rows = generated(folder, path)
    for row, text in zip(rows.values(), texts, strict=True):
        outside = [token_id for token_id in say(text) if token_id >= 300]
        assert (row.status == "error") == bool(outside), text
        if outside:
            assert (
                row.error == f"token id {outside[0]} is not in the model's vocabulary of 300: check the tokenizer's ids"
            )
    assert {row.status for row in rows.values()} == {"done", "error"}


@pytest.mark.slow
def test_a_regular_expression_that_finds_no_end_is_the_error_of_the_texts_that_it_reads(tmp_path):
    files = test_tokenizer.files_of(test_tokenizer.byte_level_with_bos())
    settings = json.loads(files["tokenizer.json"])
    settings["pre_tokenizer"] = {
        "type": "Split", "pattern": {"Regex": "^(a|a)*$"}, "behavior": "Isolated", "invert": False,
    }  # fmt: skip
    folder = model_of(tmp_path, files | {"tokenizer.json": json.dumps(settings).encode()})
    rows = [{"prompt": "cat"}, {"prompt": "a" * 40 + "z"}, {"token_ids": [5]}, {"prompt": "a" * 400 + "z"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = list(generated(folder, tmp_path / "p.jsonl").values())
    assert [row.status for row in found] == ["done", "error", "done", "error"]
    assert all("the tokenizer cannot read this text" in row.error for row in (found[1], found[3]))


def test_tokens_that_the_tokenizer_cannot_write_are_the_error_of_their_row(tmp_path):
    files = test_tokenizer.files_of(test_tokenizer.byte_level_with_bos())
    settings = json.loads(files["tokenizer.json"])
    settings["decoder"] = {"type": "Strip", "content": "e", "start": 1, "stop": 1}  # panics at the lone token "e"
    folder = model_of(tmp_path, files | {"tokenizer.json": json.dumps(settings).encode()})
    letters = {letter: settings["model"]["vocab"][letter] for letter in "eh"}
    ends = {"max_new_tokens": 1, "ignore_eos": True}
    rows = [
        {"prompt": "cat", "logit_bias": {str(letters[letter]): 100}, **ends, **more}
        for letter, more in [("h", {}), ("e", {}), ("e", {"stop": ["zz"]}), ("h", {"stop": ["zz"]})]
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = list(generated(folder, tmp_path / "p.jsonl").values())
    assert [row.status for row in found] == ["done", "error", "error", "done"]
    assert [row.token_ids.tolist() for row in found] == [[letters[letter]] for letter in "heeh"]
    assert all("the tokenizer cannot write these tokens (slice index" in row.error for row in found[1:3])


TEMPLATES = {
    "loops for ever": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "was stopped"),
    "imports os": ("{% import 'os' as os %}{{ os.system('touch harm') }}", "cannot be rendered"),
    "reaches os": ("{{ namespace.__init__.__globals__.os.system('touch harm') }}", "cannot be rendered"),
    "makes a long text": ("{{ 'a' * 10**10 }}", "it takes too much memory"),
    "makes a long answer": ("{{ messages[0].content * 10**6 }}", "its answer has more than"),
    "refuses some": ("{% if messages[0].content == 'bad' %}{{ raise_exception('no\nway') }}{% endif %}a", "no way"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_hostile_template_is_the_error_of_the_rows_that_it_renders(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source, words = TEMPLATES[name]
    monkeypatch.setattr(template, "LIMITS", replace(template.LIMITS, wall_seconds=2, answer_nbytes=2**20))
    files = test_tokenizer.files_of(test_tokenizer.byte_level_with_bos()) | {"chat_template.jinja": source.encode()}
    folder = model_of(tmp_path, files)
    rows = [{"prompt": "the"}, {"messages": [{"role": "user", "content": "bad"}]}, {"prompt": "cat"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, bad, last = generated(folder, tmp_path / "p.jsonl").values()
    assert first.status == last.status == "done" and bad.status == "error"
    assert words in bad.error.replace("\n", " ") and "\n" not in bad.error and len(bad.error) < 500
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b'{"model": ' * 50_000),
        (
            "tokenizer.json",
            b'{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 99999999999999}, "merges": []}}',
        ),
        ("tokenizer_config.json", b"[" * 200_000),
        ("chat_template.jinja", b"\xff"),
    ],
)
def test_a_tokenizer_file_that_cannot_be_read_is_refused_before_the_run(name, content, tmp_path, capsys):
    files = test_tokenizer.files_of(test_tokenizer.byte_level_with_bos()) | {name: content}
    try:
        folder = model_of(tmp_path, files)
    except InputError as error:  # convert may see it first
        assert "\n" not in str(error)
        return
    (tmp_path / "p.jsonl").write_text('{"prompt": "the"}\n')
    for command in ("run", "validate"):
        refusal(
            capsys,
            command,
            "--model",
            folder / "model.h5",
            "--prompts",
            tmp_path / "p.jsonl",
            "--output",
            tmp_path / "o.h5",
        )


# Anything at all.


def looked_at(path):
    """Reads the prompts as a run does: an InputError of one line, or as many rows as were counted."""
    try:
        number = count(path)
        rows = list(open_prompts(path))
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
        return
    assert len(rows) == number and [row.row for row in rows] == list(range(number))
    for row in rows:
        assert row.error is None or (0 < len(row.error) <= 500)
        (row.extra + row.id.encode(errors="replace").decode()).encode()


FUZZ = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
names = st.sampled_from(["prompt", "id", "token_ids", "messages", "temperature", "stop", "n", "seed", "chat", "own", "custom_id", "body", "url", "logit_bias"])  # fmt: skip
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(names | st.sampled_from(["role", "content", "type", "text"]), inner, max_size=4)
    ),
    max_leaves=9,
)
records = st.lists(st.dictionaries(names, values, max_size=5) | values, max_size=5)


@pytest.mark.parametrize("suffix", [s for name in kinds.names("readers") for s in kinds.load("readers", name).SUFFIXES])
@FUZZ
@given(content=st.binary(max_size=300))
def test_files_of_any_bytes_are_read_or_refused(tmp_path, suffix, content):
    path = tmp_path / f"any{suffix}"
    for one in (content, gzip.compress(content), b"prompt,id\n" + content):
        path.write_bytes(one)
        looked_at(path)


@FUZZ
@given(rows=records)
def test_rows_of_any_json_are_read_or_wrong(tmp_path, rows):
    path = tmp_path / "any.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    looked_at(path)
    header = "prompt,id,temperature,stop,token_ids,messages,own\n"
    path = tmp_path / "any.csv"
    path.write_text(header + "".join(",".join(json.dumps(row) for _ in range(7)) + "\n" for row in rows))
    looked_at(path)


def good_tables():
    table_bytes, columns = (
        io.BytesIO(),
        {"prompt": ["one", "two", "three"] * 20, "seed": list(range(60)), "label": ["x"] * 60},
    )
    with h5py.File(table_bytes, "w") as file:
        for name, column in columns.items():
            file.create_dataset(name, data=column, chunks=(7,), compression="gzip")
    table = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), table, row_group_size=20)
    return {".h5": table_bytes.getvalue(), ".parquet": table.getvalue()}


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".h5", ".parquet"])
def test_tables_with_any_bytes_changed_are_read_or_refused_and_never_crash(tmp_path, suffix):
    """In a process of its own: a crash of the libraries beneath would take this one along."""
    (tmp_path / f"good{suffix}").write_bytes(good_tables()[suffix])
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path), suffix],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parent,
    )
    assert done.returncode == 0, done.stdout[-300:] + done.stderr[-3000:]
    assert done.stdout.endswith("looked at 400 files\n") and "Traceback" not in done.stderr


def share_child():
    """Lets one child read all files of HDF5, and another when that has ended too often: their starts take long."""
    made, make = [], hdf5._helper

    def shared():
        if not made or made[-1].given_up:
            made.append(make())
            made[-1].close = lambda: None
        return made[-1]

    hdf5._helper = shared


def look_at_damaged(folder, suffix):
    good, choose = (folder / f"good{suffix}").read_bytes(), random.Random(5)
    resource.setrlimit(resource.RLIMIT_AS, (8 * GiB, 8 * GiB))
    share_child()
    for number in range(400):
        content = bytearray(good)
        for _ in range(choose.choice((1, 1, 3, 20))):
            content[choose.randrange(len(content))] = choose.choice((0, 1, 127, 128, 255, choose.randrange(256)))
        if choose.random() < 0.1:
            del content[choose.randrange(len(content)) :]
        path = folder / f"damaged{suffix}"
        path.write_bytes(content)
        print(number, flush=True)
        looked_at(path)
    print("looked at 400 files")


@FUZZ
@given(content=st.text(max_size=200) | st.binary(max_size=100).map(lambda content: content.decode("latin1")))
def test_run_files_of_any_text_are_read_or_refused(tmp_path, content):
    path = tmp_path / "run.toml"
    for text in (content, f"[sampling]\nstop = {content}", f'model = "{content}"'):
        path.write_text(text, errors="replace")
        with contextlib.suppress(InputError):
            configuration.load(path)


if __name__ == "__main__":
    look_at_damaged(Path(sys.argv[1]), sys.argv[2])
