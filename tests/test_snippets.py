"""What README.md and outputs/README.md show of Python, and of reading an output without Noria: h5py and pandas, h5dump, R.

Each is run on an output.
"""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mpirun import environment, of_forks
from noria.checkpoint.convert import convert
from noria.launch import call
from noria.output.generations import open_generations
from noria.output.merge import merge
from noria.output.parts import Parts
from output_rows import fill, make_row

PANDAS = """
import h5py, pandas
with h5py.File("run.h5") as file:
    frame = pandas.DataFrame({name: file[name].asstr()[:] for name in ("id", "prompt", "text", "error")})
    for name in ("status", "finish_reason"):
        names = {value: word for word, value in h5py.check_enum_dtype(file[name].dtype).items()}
        frame[name] = [names[value] for value in file[name][:]]
    frame["tokens"] = [file["tokens"][a:b] for a, b in zip(file["offsets"][:-1], file["offsets"][1:])]
"""
H5DUMP = "h5dump -d /text -s 0 -c 3 run.h5"
R = """
library(hdf5r)
file <- H5File$new("run.h5", mode = "r")
frame <- data.frame(id = file[["id"]][], text = file[["text"]][], status = as.character(file[["status"]][]))
offsets <- as.numeric(file[["offsets"]][])
tokens <- file[["tokens"]][]
first <- tokens[seq_len(offsets[2])]
"""
ROWS = [make_row(row, num_tokens=row + 2, status="error" if row == 3 else "done") for row in range(6)]


def test_the_manual_of_outputs_shows_what_is_run_here():
    manual = (Path(__file__).parent.parent / "outputs" / "README.md").read_text()
    assert all(snippet.strip() in manual for snippet in (PANDAS, H5DUMP, R))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    parts = Parts(tmp_path / "run.h5", {"run": 1})
    fill(parts, ROWS, 4)
    merge(parts, tmp_path / "run.h5", len(ROWS), {}, {})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_pandas_has_every_row_and_its_tokens(folder):
    pytest.importorskip("pandas")
    names = {}
    exec(PANDAS, names)
    frame = names["frame"]
    for name in ("id", "prompt", "text", "error", "status", "finish_reason"):
        assert frame[name].tolist() == [getattr(row, name) for row in ROWS]
    assert all(np.array_equal(got, row.token_ids) for got, row in zip(frame.tokens, ROWS, strict=True))


def python_of(manual):
    """The one snippet in a manual that imports noria."""
    text = (Path(__file__).parent.parent / manual).read_text()
    [found] = [
        code for code in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE) if "import noria" in code
    ]
    return found


@pytest.mark.slow
@pytest.mark.mpi
def test_python_of_the_readme_generates(tmp_path, monkeypatch, capsys):
    pytest.importorskip("pandas")
    demo = Path(__file__).parent.parent / "inputs" / "demo" / "model"
    convert(demo, tmp_path / "model.h5")
    monkeypatch.chdir(tmp_path)
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    command = ["mpirun", "-n", "2", *of_forks([sys.executable, "-m", "noria"])]
    monkeypatch.setattr(call, "command", lambda ranks, *arguments: [*command, *arguments])
    names = {}
    exec(python_of("README.md"), names)
    with open_generations(tmp_path / "run.h5") as file:
        rows = list(file.rows())
    assert [row.prompt for row in rows] == ["The LORD is my", "In the beginning"]
    assert capsys.readouterr().out == f"{rows[0].text} {names['run'].to_pandas()}\n"


def test_python_of_the_manual_of_outputs_reads(tmp_path, monkeypatch, capsys):
    pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    rows = [replace(row, id=name) for row, name in zip(ROWS, ("moses", "in", "shepherd", "x", "y", "z"), strict=True)]
    monkeypatch.chdir(tmp_path)
    fill(Parts("run.h5", {"run": 1}), rows, 4)
    names = {}
    exec(python_of("outputs/README.md"), names)
    shepherd = rows[2]
    assert capsys.readouterr().out.strip() == f"6 {shepherd.text} {shepherd.token_ids} {{}}".strip()
    assert (names["first"].id, names["some"].path.name) == ("moses", "run.h5")
    assert names["table"]["id"].to_pylist() == ["in", "shepherd"] and names["frame"].id.tolist() == [
        row.id for row in rows
    ]


@pytest.mark.skipif(not shutil.which("h5dump"), reason="needs h5dump (hdf5-tools)")
def test_h5dump_shows_the_first_texts(folder):
    done = subprocess.run(H5DUMP, shell=True, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for row in ROWS[:3]:  # it writes what is not ASCII as octal numbers
        assert f'"{row.text.split("😀")[0]}' in done.stdout
    assert '"text 3' not in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("Rscript"), reason="needs R")
def test_r_has_ids_texts_and_tokens(folder):
    program = R + '\ncat(paste(frame$id, collapse = ","), "\\n", paste(first, collapse = ","), "\\n", frame$status)\n'
    if subprocess.run(["Rscript", "-e", "library(hdf5r)"], capture_output=True, timeout=60).returncode:
        pytest.skip("needs the R package hdf5r")
    done = subprocess.run(["Rscript", "-e", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    ids, tokens, status = (line.strip() for line in done.stdout.splitlines())
    assert ids.split(",") == [row.id for row in ROWS] and json.loads(f"[{tokens}]") == ROWS[0].token_ids.tolist()
    assert status.split() == [row.status for row in ROWS]
