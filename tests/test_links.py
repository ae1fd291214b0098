"""Outputs, folders of parts and exports that are links: they stay links, and what they lead to is what is written."""

import errno
import json
import os
import subprocess
import sys

import pytest

import small_run
from forks import forked
from noria.__main__ import main
from noria.errors import InputError
from noria.output import target as output_module
from noria.output.generations import open_generations
from noria.output.merge import merge
from noria.output.parts import Parts, remove_parts
from noria.output.sealed import merged_folder, parts_folder
from noria.output.target import probe_output, reopen
from noria.tools import lock
from noria.tools.atomic import check_folder, real, replacing
from noria.tools.lock import check_names
from output_rows import as_tuple, fill, make_row

HEADER = {"prompts": "ab12", "dtype": "float32"}


def silent(message):
    pass


def rows_of(path):
    with open_generations(path) as file:
        return [as_tuple(row) for row in file.rows()]


@pytest.fixture
def linked(tmp_path):
    """An output that is a relative link to a file in another folder, which is not there yet."""
    (tmp_path / "store").mkdir()
    os.symlink("store/real.h5", tmp_path / "run.h5")
    return tmp_path / "run.h5"


@pytest.fixture
def scratch(tmp_path):
    """A folder to which the parts of run.h5 are a link."""
    (tmp_path / "scratch").mkdir()
    os.symlink("scratch", tmp_path / "run.h5.parts")
    return tmp_path / "scratch"


def finish(path, num_rows=3):
    parts = Parts(path, HEADER, report=silent)
    fill(parts, [make_row(row) for row in range(num_rows)], 2)
    merge(parts, path, range(num_rows), {})


def test_an_output_that_is_a_link_is_written_where_it_leads(linked, tmp_path):
    finish(linked)
    assert os.listdir(tmp_path / "store") == ["real.h5"] and sorted(os.listdir(tmp_path)) == ["run.h5", "store"]
    assert os.readlink(linked) == "store/real.h5" and len(rows_of(linked)) == 3


def test_parts_lie_beside_the_file_that_a_link_leads_to_under_either_name(linked, tmp_path):
    fill(Parts(linked, HEADER, report=silent), [make_row(0)])
    assert parts_folder(linked) == parts_folder(tmp_path / "store" / "real.h5") == tmp_path / "store" / "real.h5.parts"
    assert probe_output(linked) == probe_output(tmp_path / "store" / "real.h5") == "parts"


def test_a_finished_output_that_is_a_link_goes_on(linked, tmp_path):
    finish(linked)
    reopen(linked)
    assert probe_output(linked) == "parts" and os.path.islink(linked)
    parts = Parts(linked, HEADER, report=silent)
    parts.add(make_row(3))
    merge(parts, linked, range(4), {})
    assert len(rows_of(tmp_path / "store" / "real.h5")) == 4 and os.listdir(tmp_path / "store") == ["real.h5"]


def test_an_old_output_that_is_a_link_is_moved_aside_where_it_lies(linked, tmp_path):
    finish(linked)
    assert probe_output(linked, overwrite=True) == "absent"
    assert os.listdir(tmp_path / "store") == ["real.h5.old-1"] and os.path.islink(linked)
    finish(linked, 2)
    assert (len(rows_of(tmp_path / "store" / "real.h5.old-1")), len(rows_of(linked))) == (3, 2)


def test_a_folder_of_parts_that_is_a_link_is_emptied_and_stays_a_link(scratch, tmp_path):
    (scratch / "notes.txt").write_text("mine")
    for _ in range(2):
        parts = Parts(tmp_path / "run.h5", HEADER, report=silent)
        parts.begin({"of": 3})
        fill(parts, [make_row(row) for row in range(3)], 2)
        assert len(os.listdir(scratch)) == 4
        merge(parts, tmp_path / "run.h5", range(3), {})
        assert os.listdir(scratch) == ["notes.txt"] and os.readlink(tmp_path / "run.h5.parts") == "scratch"
        assert probe_output(tmp_path / "run.h5", overwrite=True) == "absent"


def test_a_removal_of_linked_parts_that_was_killed_is_finished_by_the_next_run(scratch, tmp_path):
    output = tmp_path / "run.h5"
    fill(Parts(output, HEADER, report=silent), [make_row(0)])
    os.rename(parts_folder(output), merged_folder(output))
    assert Parts(output, HEADER, report=silent).parts == []
    assert os.listdir(scratch) == [] and os.readlink(parts_folder(output)) == "scratch"
    os.rename(parts_folder(output), merged_folder(output))
    parts_folder(output).mkdir()
    remove_parts(output)
    assert sorted(os.listdir(tmp_path)) == ["scratch"]


def test_a_finished_output_becomes_a_part_in_another_file_system(scratch, tmp_path, monkeypatch):
    output, rename = tmp_path / "run.h5", os.rename
    finish(output)

    def within(source, target):
        if os.path.realpath(os.path.dirname(source)) != os.path.realpath(os.path.dirname(target)):
            raise OSError(errno.EXDEV, "Invalid cross-device link", str(source), None, str(target))
        rename(source, target)

    monkeypatch.setattr(output_module.os, "rename", within)
    reopen(output)
    assert os.listdir(scratch) == ["part-000000.h5"] and not output.exists()
    assert len(Parts(output, HEADER, report=silent).finished()) == 3


def test_links_that_lead_nowhere_are_refused_by_name(tmp_path):
    output = tmp_path / "run.h5"
    os.symlink("gone", tmp_path / "run.h5.parts")
    with pytest.raises(InputError, match=r"run.h5.parts is a link to a folder that is not there"):
        probe_output(output)
    os.symlink("away/real.h5", tmp_path / "b.h5")
    with pytest.raises(InputError, match=r"b.h5: there is no folder .*away"):
        check_folder(tmp_path / "b.h5")
    os.symlink("c.h5", tmp_path / "c.h5")
    with pytest.raises(InputError, match=r"c.h5 is a link that leads back to itself"):
        check_folder(tmp_path / "c.h5")


def test_any_written_file_that_is_a_link_stays_one(tmp_path):
    (tmp_path / "there").mkdir()
    os.symlink("there/x", tmp_path / "y")
    os.symlink("y", tmp_path / "z")
    for text in ("new", "newer"):
        with replacing(tmp_path / "z") as path:
            assert path.parent == tmp_path / "there"
            path.write_text(text)
        assert (tmp_path / "there" / "x").read_text() == text
    assert os.listdir(tmp_path / "there") == ["x"] and real(tmp_path / "z") == tmp_path / "there" / "x"


@pytest.mark.parametrize(("letter", "most"), [("x", 241), ("ä", 120)])
def test_a_name_too_long_for_those_beside_it_is_refused(tmp_path, letter, most):
    check_names(tmp_path / (letter * most))
    with pytest.raises(InputError, match=rf"the name has {len((letter * (most + 1)).encode())} bytes.*shorten it"):
        check_names(tmp_path / (letter * (most + 1)))


def test_a_path_too_long_for_its_parts_is_refused(tmp_path):
    path = tmp_path / ("/".join(["x" * 205] * 19)) / "run.h5"
    with pytest.raises(InputError, match="the path .* too long"):
        check_names(path)


@pytest.mark.slow
def test_runs_on_links_extend_overwrite_and_leave_nothing(tmp_path, capsys):
    small_run.write_files(tmp_path)
    (tmp_path / "store").mkdir()
    (tmp_path / "scratch").mkdir()
    os.symlink("store/real.h5", tmp_path / "link.h5")
    os.symlink("../scratch", tmp_path / "store" / "real.h5.parts")
    assert main(small_run.command(tmp_path, "plain.h5")) == main(small_run.command(tmp_path, "link.h5")) == 0
    assert small_run.rows_of(tmp_path / "link.h5") == small_run.rows_of(tmp_path / "plain.h5")
    with (tmp_path / "prompts.jsonl").open("a") as file:
        file.write(json.dumps({"id": "more", "token_ids": [5, 6]}) + "\n")
    assert main(small_run.command(tmp_path, "link.h5", "--extend")) == 0
    rows = small_run.rows_of(tmp_path / "link.h5")
    assert len(rows) == small_run.NUM_ROWS + 1 and os.readlink(tmp_path / "link.h5") == "store/real.h5"
    assert main(small_run.command(tmp_path, "link.h5", "--overwrite")) == 0
    assert small_run.rows_of(tmp_path / "store" / "real.h5") == rows
    assert os.listdir(tmp_path / "scratch") == []
    assert sorted(os.listdir(tmp_path / "store")) == ["real.h5", "real.h5.old-1", "real.h5.parts"]


@pytest.mark.parametrize("command", ["run", "merge", "convert", "validate"])
def test_a_long_name_is_refused_by_every_command_at_its_start(tmp_path, capsys, command):
    output = tmp_path / ("x" * 245 + ".h5")
    files = ["--model", tmp_path / "m.h5", "--prompts", tmp_path / "p.jsonl", "--output", output]
    (tmp_path / "p.jsonl").write_text('{"prompt": "x"}\n')
    arguments = {"run": files, "validate": files, "merge": [output, "a.h5"], "convert": [tmp_path, output]}[command]
    (tmp_path / "config.json").write_text("{}")
    assert main([command, *map(str, arguments)]) == 2
    said = capsys.readouterr().err
    assert "too long for those of its parts" in said or command == "convert", said
    assert sorted(os.listdir(tmp_path)) == ["config.json", "p.jsonl"]


def test_two_outputs_whose_parts_are_links_to_one_folder_do_not_run_at_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 0.1)
    small_run.write_files(tmp_path)
    (tmp_path / "scratch").mkdir()
    for name in ("a.h5", "b.h5"):
        os.symlink("scratch", tmp_path / f"{name}.parts")
    script = "import sys\nfrom noria.tools.lock import OutputLock\n" + (
        "lock = OutputLock(sys.argv[1], {'job': '17', 'host': 'n3', 'process': 1, 'start': 's'}, print)\n"
        "print('held', flush=True)\nsys.stdin.read()\n"
    )
    command = forked([sys.executable, "-c", script, tmp_path / "scratch" / "parts"])
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        assert main(small_run.command(tmp_path, "b.h5")) == 2
        assert "scratch/parts is being written by job 17 on n3" in capsys.readouterr().err
        other.stdin.close()
    assert main(small_run.command(tmp_path, "b.h5")) == 0 and os.listdir(tmp_path / "scratch") == []
