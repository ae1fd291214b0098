"""Keys of a config.json that nobody knows: refused when a model is converted or made of random weights, named when opened."""

import json

import h5py
import pytest

import small_run
from noria.__main__ import main
from noria.checkpoint.checkpoint import KEYS, open_checkpoint
from noria.errors import InputError

KEY = {"unheard_of": 0.5}
WORDS = "config.json: unheard_of is 0.5: Noria does not know what it asks for"


@pytest.fixture
def folder(tmp_path):
    """A run's files, whose model a version converted that knew the key, and that marked its file as such or not."""
    return small_run.write_files(tmp_path)


def with_the_key(path, by_an_earlier_version):
    with h5py.File(path, "r+") as file:
        file.attrs["config"] = json.dumps(json.loads(file.attrs["config"]) | KEY)
        if by_an_earlier_version:
            del file.attrs[KEYS]


def said(capsys, *command):
    """The exit code of a command, and the lines that it writes."""
    code, (out, err) = main(command), capsys.readouterr()
    return code, (out + err).splitlines()


def test_a_model_with_such_a_key_is_neither_converted_nor_made(folder, capsys):
    config = folder / "hf" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | KEY))
    code, (line,) = said(capsys, "convert", str(folder / "hf"), str(folder / "new.h5"))
    assert code == 2 and WORDS in line and not (folder / "new.h5").exists()
    prompts = str(folder / "prompts.jsonl")
    made = "run", "--random-weights", str(config), "--prompts", prompts, "--output", str(folder / "run.h5")
    code, (line,) = said(capsys, *made)
    assert code == 2 and WORDS in line


def test_a_checkpoint_of_a_later_version_that_knew_the_key_is_refused(folder):
    with_the_key(folder / "model.h5", by_an_earlier_version=False)
    with pytest.raises(InputError, match=WORDS):
        open_checkpoint(folder / "model.h5")


@pytest.mark.slow
def test_a_checkpoint_of_an_earlier_version_runs_as_it_did_and_each_command_names_the_key(folder, capsys):
    main(small_run.command(folder, "before.h5"))
    with_the_key(folder / "model.h5", by_an_earlier_version=True)
    command = small_run.command(folder, "after.h5")
    commands = {
        "inspect": ["inspect", str(folder / "model.h5")],
        "plan": ["plan", "--ranks", "1", *command[1:]],
        "validate": ["validate", *command[1:]],
        "run": command,
    }
    capsys.readouterr()
    for name, words in commands.items():
        code, lines = said(capsys, *words)
        assert code == 0 and len([line for line in lines if WORDS in line]) == 1, (name, lines)
    assert small_run.rows_of(folder / "after.h5") == small_run.rows_of(folder / "before.h5")
    assert main(["inspect", "--json", str(folder / "model.h5")]) == 0
    assert [WORDS in note for note in json.loads(capsys.readouterr().out)["notes"]] == [True]
