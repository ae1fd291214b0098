"""noria help: the commands, each command's flags by kinds, on a screen."""

import re

import pytest

from noria.__main__ import COMMANDS, main


def said(capsys, *arguments):
    capsys.readouterr()
    try:
        code = main(list(arguments))
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    return out


def test_help_names_every_command(capsys):
    out = said(capsys, "help")
    assert out == said(capsys, "--help") and all(f"\n  {name} " in out for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_is_that_of_its_flag_and_its_usage_fits_a_screen(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    out = said(capsys, "help", command)
    assert out == said(capsys, command, "--help")
    usage = out.split("\n\n")[0].splitlines()
    assert usage[0].startswith(f"usage: noria {command} ") and len(usage) <= 6 and max(map(len, usage)) <= 80


def test_flags_of_a_run_show_the_kind_of_their_value(capsys):
    out = said(capsys, "help", "run")
    found = dict(re.findall(r"^  --([a-z-]+) ([^a-z\s]\S*)", out, re.MULTILINE))
    expected = {
        "seed": "INT",
        "top-p": "NUMBER",
        "gpu-memory": "SIZE",
        "model": "FILE",
        "scratch": "DIR",
        "system": "TEXT",
    }
    expected |= {"chat-template-kwargs": "JSON", "stop-token-ids": "INT,...", "cache": "TIER=SHARE,...", "shard": "I/N"}
    assert expected.items() <= found.items()
    assert not [name for name, value in found.items() if value == name.upper().replace("-", "_")]


def test_help_of_no_command_is_an_error_that_names_the_near_one(capsys):
    assert main(["help", "inspec"]) == 2 and "did you mean 'inspect'?" in capsys.readouterr().err
