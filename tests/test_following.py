"""`noria export --follow`: every finished row once, whatever is killed, put together, merged or torn meanwhile."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

import small_run
from counts import count
from forks import forked
from noria.__main__ import main
from noria.commands import export as command
from noria.errors import InputError
from noria.output import following as module
from noria.output.compact import Compactor
from noria.output.export import as_object, export, line_of
from noria.output.following import Following, follow
from noria.output.growing import GrowingFile
from noria.output.merge import merge
from noria.output.parts import Parts, part_files
from noria.output.wanted import WantedRows
from noria.rows.prompt_files import content_hash, content_key
from noria.tools import lock
from noria.tools.looking import Looker
from output_rows import fill, make_row

HEADER = {"prompts": "ab12 of 5 bytes", "dtype": "float32"}
FOLLOW = "--follow"


@pytest.fixture
def output(tmp_path):
    return tmp_path / "run.h5"


@pytest.fixture
def target(tmp_path):
    return tmp_path / "rows.jsonl"


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(command, "LOOK_SECONDS", 0.01)


@pytest.fixture(scope="module", autouse=True)
def looker():
    """One for all tests: to start a child takes most of the time."""
    with Looker() as one:
        SHARED.append(one)
        yield


SHARED = []


def following(output, file, wanted=None, told=None):
    report = pytest.fail if told is None else told.append
    return Following(output, file, wanted or WantedRows(), SHARED[-1], report)


def steps(output, target, times=1, **more):
    """What so many looks at the output write; whether it is whole."""
    with GrowingFile(target) as file:
        one = following(output, file, **more)
        one.begin()
        found = [one.step() for _ in range(times)]
    return found[-1]


def ids(target):
    return [json.loads(line)["id"] for line in target.read_text().splitlines()]


def lines_of(rows):
    return b"".join(line_of(as_object(row)) for row in rows)


def noria(output, target, *more):
    return main(["export", str(output), str(target), FOLLOW, *map(str, more)])


def test_rows_are_written_as_they_are_sealed_and_once(output, target):
    rows = [make_row(row, status="error" if row == 2 else "done") for row in range(5)]
    parts = Parts(output, HEADER)
    with GrowingFile(target) as file:
        one = following(output, file)
        one.begin()
        assert not one.step() and target.read_bytes() == b""
        fill(parts, [rows[1], make_row(4, status="todo"), rows[0]], 3)
        assert not one.step() and target.read_bytes() == lines_of(rows[:2]), "those half-way are not finished"
        fill(parts, [rows[2]], 1)
        assert not one.step() and not one.step() and target.read_bytes() == lines_of(rows[:3])
        fill(parts, rows[3:], 2)
        merge(parts, output, 5, {}, {})
        assert one.step() and one.num_written == 5
    assert target.read_bytes() == lines_of(rows)
    export(output, target.with_name("all.jsonl"))
    assert target.with_name("all.jsonl").read_bytes() == target.read_bytes()


def test_a_follower_that_begins_again_skips_what_the_file_has(output, target):
    rows = [make_row(row) for row in range(6)]
    parts = Parts(output, HEADER)
    fill(parts, rows[:4], 2)
    steps(output, target)
    before = target.read_bytes()
    assert not steps(output, target) and target.read_bytes() == before
    fill(parts, rows[4:], 2)
    target.write_bytes(lines_of([rows[3], rows[0]]))  # a follower that was killed in the midst
    steps(output, target)
    assert sorted(ids(target)) == sorted(row.id for row in rows) and ids(target)[:2] == ["row-3", "row-0"]
    merge(parts, output, 6, {}, {})
    before = target.read_bytes()
    assert steps(output, target) and target.read_bytes() == before


@pytest.mark.parametrize("merged", [False, True])
def test_a_last_line_that_was_cut_is_written_again_whole(output, target, merged, capsys):
    rows = [make_row(0), make_row(1)]
    parts = Parts(output, HEADER)
    fill(parts, rows, 2)
    if merged:
        merge(parts, output, 2, {}, {})
    whole = lines_of(rows)
    first = len(lines_of(rows[:1]))
    for cut in sorted({1, 5, 8, 9, 16, 17, first - 1, first, first + 1, first + 12, first + 25, len(whole) - 1}):
        target.write_bytes(whole[:cut])
        told = []
        steps(output, target, told=told)
        assert len(told) == (cut != first)
        assert target.read_bytes() == whole, cut


def test_parts_that_are_put_together_or_merged_while_they_are_read_give_each_row_once(output, target, monkeypatch):
    rows, gather = [make_row(row) for row in range(12)], module.gather
    parts = Parts(output, HEADER)
    fill(parts, rows[:8], 1)
    due = ["compact", "merge"]

    def late(*arguments):
        what = due.pop(0) if due else ""
        if what == "compact":
            assert Compactor(parts, 4).compact_if_due()
        if what == "merge":
            fill(parts, rows[8:], 1)
            merge(parts, output, 12, {}, {})
        return gather(*arguments)

    with GrowingFile(target) as file:
        one = following(output, file)
        monkeypatch.setattr(module, "gather", late)
        one.begin()
        while not one.step():
            pass
    assert not due and sorted(ids(target)) == sorted(row.id for row in rows)


def test_a_part_that_goes_away_before_it_is_opened_is_no_damaged_one(output, target, monkeypatch):
    rows, scan_one, due = [make_row(row) for row in range(8)], module.scan_one, [True]
    parts = Parts(output, HEADER)
    fill(parts, rows, 1)

    def late(*arguments, **more):
        if due.pop() if due else False:
            assert Compactor(parts, 4).compact_if_due()
        return scan_one(*arguments, **more)

    monkeypatch.setattr(module, "scan_one", late)
    steps(output, target, 2)
    assert not due and sorted(ids(target)) == [row.id for row in rows]


def test_the_comparison_begins_again_where_a_part_goes_away_meanwhile(output, target, monkeypatch):
    rows, gather, due = [make_row(row) for row in range(8)], module.gather, [True]
    parts = Parts(output, HEADER)
    fill(parts, rows, 1)
    target.write_bytes(lines_of(rows[2:6]))

    def late(*arguments):
        if due.pop() if due else False:
            assert Compactor(parts, 4).compact_if_due()
        return gather(*arguments)

    monkeypatch.setattr(module, "gather", late)
    steps(output, target, 2)
    assert not due and sorted(ids(target)) == [row.id for row in rows]


def test_an_error_that_was_tried_again_comes_once_more_as_what_it_is_now(output, target):
    parts = Parts(output, HEADER)
    wrong = make_row(1, status="error")
    fill(parts, [make_row(0), wrong], 2)
    with GrowingFile(target) as file:
        one = following(output, file)
        one.step()
        other = make_row(1, status="error")
        other.error = "another reason"
        fill(parts, [wrong, other], 1)
        one.step()
        fill(parts, [make_row(1)], 1)
        one.step()
        assert target.read_bytes() == lines_of([make_row(0), wrong, other, make_row(1)])
        merge(parts, output, 2, {}, {})
        assert one.step()
    assert target.read_bytes() == lines_of([make_row(0), wrong, other, make_row(1)])
    assert steps(output, target), "the lines of errors are no other run's"
    assert target.read_bytes() == lines_of([make_row(0), wrong, other, make_row(1)])


def test_two_rows_of_one_id_are_two_lines(output, target):
    rows = [make_row(row) for row in range(3)]
    for row in rows:
        row.id = "same"
    rows[2].text = rows[1].text = "same"
    rows[2].prompt, rows[2].prompt_token_ids, rows[2].token_ids = (
        rows[1].prompt,
        rows[1].prompt_token_ids,
        rows[1].token_ids,
    )
    rows[2].extra, rows[2].finish_reason = rows[1].extra, rows[1].finish_reason
    parts = Parts(output, HEADER)
    fill(parts, rows, 1)
    target.write_bytes(lines_of(rows[1:2]))
    steps(output, target)
    assert sorted(target.read_bytes().splitlines()) == sorted(lines_of(rows).splitlines())


def test_a_damaged_part_is_told_once_and_its_rows_come_when_they_are_generated_again(output, target):
    parts, told = Parts(output, HEADER), []
    fill(parts, [make_row(row) for row in range(4)], 2)
    path = part_files(parts.folder)[0]
    path.write_bytes(path.read_bytes()[:-99])
    with GrowingFile(target) as file:
        one = following(output, file, told=told)
        one.step()
        one.step()
        assert len(told) == 1 and "part-000000.h5" in told[0] and ids(target) == ["row-2", "row-3"]
        fill(Parts(output, HEADER, report=lambda line: None), [make_row(0), make_row(1)], 2)
        one.step()
    assert ids(target) == ["row-2", "row-3", "row-0", "row-1"]


def test_a_run_that_began_anew_is_followed_and_another_run_is_refused(output, target):
    parts = Parts(output, HEADER)
    fill(parts, [make_row(0)], 1)
    with GrowingFile(target) as file:
        one = following(output, file)
        one.step()
        parts.remove()
        fill(Parts(output, HEADER | {"prompts": "longer"}), [make_row(0), make_row(1)], 2)
        one.step()
        assert ids(target) == ["row-0", "row-1"], "a part of a name that was read before is read"
        parts.remove()
        fill(Parts(output, HEADER | {"dtype": "float64"}), [make_row(2)], 1)
        with pytest.raises(InputError, match=r"run.h5 is of another run now \(dtype differ\): name another file"):
            one.step()
    assert ids(target) == ["row-0", "row-1"]


@pytest.mark.slow
def test_some_rows_alone_can_be_followed(output, target, tmp_path, capsys):
    parts = Parts(output, HEADER)
    fill(parts, [make_row(row, status="error" if row == 3 else "done") for row in range(5)], 2)
    merge(parts, output, 5, {}, {})
    assert noria(output, target, "--status", "error") == 0 and ids(target) == ["row-3"]
    assert noria(output, tmp_path / "b.jsonl", "--finish-reason", "stop") == 0
    assert ids(tmp_path / "b.jsonl") == ["row-0", "row-2", "row-4"]
    (tmp_path / "ids").write_text("row-4\nrow-9\n")
    capsys.readouterr()
    assert noria(output, tmp_path / "c.jsonl", "--ids", tmp_path / "ids") == 0
    assert ids(tmp_path / "c.jsonl") == ["row-4"] and "1 id of 2 not found: 'row-9'" in capsys.readouterr().err


OTHERS = {
    "another row of that id": (lambda: lines_of([changed(1)]), "holds row 'row-1' otherwise than"),
    "rows of another run": (lambda: lines_of([make_row(77), make_row(78)]), "holds 2 rows, and none is of"),
    "prompts": (lambda: b'{"id": "a", "prompt": "b"}\n', "line 1: it is no exported row"),
    "prompts without an end": (lambda: b'{"id": "a", "prompt": "b"}', "line 1: it is no exported row"),
    "prompts that were cut": (lambda: b'{"id": "a", "prompt": "b', "line 1: it is no exported row"),
    "a line of another kind": (lambda: lines_of([make_row(1)]) + b"note\n", "line 2: it is no exported row"),
    "text": (lambda: b"hello", "line 1: it is no exported row"),
    "bytes": (lambda: b"\x89HDF\r\n\x1a\n\0\0", "line 1: it is no exported row"),
    "a list": (lambda: b"[1]\n", "line 1: it is no exported row"),
}


def changed(row):
    one = make_row(row)
    one.text += " changed"
    return one


@pytest.mark.parametrize("case", OTHERS)
def test_a_file_that_holds_anything_else_is_refused_and_stays_as_it_is(output, target, capsys, case):
    content, words = OTHERS[case]
    parts = Parts(output, HEADER)
    fill(parts, [make_row(row) for row in range(3)], 1)
    merge(parts, output, 3, {}, {})
    target.write_bytes(content())
    assert noria(output, target) == 2
    said = capsys.readouterr().err
    assert words in said and "name a" in said and len(said.splitlines()) == 1
    assert target.read_bytes() == content()


def test_links_pipes_folders_and_the_output_itself_are_refused(output, target, tmp_path, capsys):
    parts = Parts(output, HEADER)
    fill(parts, [make_row(0)], 1)
    merge(parts, output, 1, {}, {})
    whole = output.read_bytes()
    os.symlink("rows.jsonl", tmp_path / "link.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    os.link(output, tmp_path / "same.jsonl")
    for name, words in (
        ("link.jsonl", "is a link: name the file itself"),
        ("pipe.jsonl", "is not a regular file"),
        ("folder.jsonl", "is a directory"),
        ("no/rows.jsonl", "no such file or directory"),
        ("same.jsonl", "is no exported row"),
        ("rows.csv", "--follow writes rows as JSON lines"),
        ("rows.jsonl.gz", "--follow writes rows as JSON lines"),
    ):
        assert noria(output, tmp_path / name) == 2, name
        assert words in capsys.readouterr().err, name
    assert not target.exists() and output.read_bytes() == whole
    assert noria(output, target, "--format", "openai") == 2
    assert "not --format openai" in capsys.readouterr().err
    assert noria(tmp_path / "no" / "run.h5", target) == 2
    assert "there is no folder" in capsys.readouterr().err


@pytest.mark.parametrize("merged", [False, True])
def test_the_prompts_of_the_run_are_refused_though_they_are_exported_rows_themselves(output, target, capsys, merged):
    target.write_bytes(lines_of([make_row(0)]))
    parts = Parts(output, HEADER | {"prompts": content_key(target, content_hash(target))})
    fill(parts, [make_row(0)], 1)
    if merged:
        merge(parts, output, 1, {}, {})
    assert noria(output, target) == 2
    assert "rows.jsonl holds the prompts of" in capsys.readouterr().err
    assert target.read_bytes() == lines_of([make_row(0)])


@pytest.mark.parametrize("cut", [1, 40])
def test_prompts_that_end_without_an_end_of_line_are_not_repaired_before_they_are_refused(output, target, capsys, cut):
    target.write_bytes(lines_of([make_row(0), make_row(1)])[:-cut])
    before = target.read_bytes()
    fill(Parts(output, HEADER | {"prompts": content_key(target, content_hash(target))}), [make_row(0)], 1)
    assert noria(output, target) == 2
    assert "rows.jsonl holds the prompts of" in capsys.readouterr().err and target.read_bytes() == before


def test_rows_of_another_run_are_refused_when_the_first_of_them_comes(output, target):
    target.write_bytes(lines_of([changed(1)]))
    parts = Parts(output, HEADER)
    with GrowingFile(target) as file:
        one = following(output, file)
        one.begin()
        assert not one.step()
        fill(parts, [make_row(0), make_row(1)], 2)
        with pytest.raises(InputError, match="holds row 'row-1' otherwise than"):
            one.step()
    assert target.read_bytes() == lines_of([changed(1)])


def test_two_followers_of_one_file_are_one_too_many(output, target, monkeypatch):
    monkeypatch.setattr("noria.output.growing.PATIENCE", 0.1)
    with subprocess.Popen(
        [sys.executable, "-c", f"import fcntl,time; f=open({str(target)!r},'a'); fcntl.lockf(f,2); print(1,flush=True); time.sleep(60)"],
        stdout=subprocess.PIPE,
    ) as other:  # fmt: skip
        other.stdout.readline()
        with pytest.raises(InputError, match="is being written by another process"):
            GrowingFile(target)
        other.kill()
    GrowingFile(target).__exit__()
    assert lock.PATIENCE == 5.0


def test_a_file_that_is_taken_away_ends_the_follower(output, target, capsys):
    parts = Parts(output, HEADER)
    fill(parts, [make_row(0)], 1)
    with GrowingFile(target) as file:
        one = following(output, file)
        target.rename(target.with_name("moved.jsonl"))
        with pytest.raises(OSError, match="it was removed or replaced"):
            one.step()
        target.write_text("")
        with pytest.raises(OSError, match="it was removed or replaced"):
            one.step()


def test_stdout_gets_the_lines(output, capsys):
    rows = [make_row(row) for row in range(3)]
    parts = Parts(output, HEADER)
    fill(parts, rows, 1)
    merge(parts, output, 3, {}, {})
    assert noria(output, "-") == 0
    said = capsys.readouterr()
    assert said.out.encode() == lines_of(rows) and "3 rows written to stdout" in said.err


@pytest.mark.slow
def test_a_follower_waits_for_its_run_and_a_signal_ends_it_with_75(output, target):
    arguments = [sys.executable, "-m", "noria", "export", output, target, FOLLOW]
    with subprocess.Popen(forked(arguments), stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr.readline() == f"{output} is not there yet: waiting for its run\n"
        fill(Parts(output, HEADER), [make_row(0)], 1)
        wait_for(lambda: target.read_bytes())
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 75
        end = f"1 row written to {target}; {output} is not whole yet: the same command goes on\n"
        assert process.stderr.read() == end


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


@pytest.mark.slow
def test_a_reader_of_stdout_that_goes_away_ends_the_follower(output):
    parts = Parts(output, HEADER)
    rows = [make_row(row, num_tokens=3000) for row in range(40)]
    fill(parts, rows, 40)
    arguments = [sys.executable, "-m", "noria", "export", output, "-", FOLLOW]
    with subprocess.Popen(forked(arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(20) == 1 and process.stderr.read() == b""


@pytest.mark.slow
def test_a_real_run_is_followed_from_before_its_beginning_over_a_stop_to_its_end(tmp_path):
    folder, target = small_run.write_files(tmp_path), tmp_path / "rows.jsonl"
    output = folder / "run.h5"
    arguments = [sys.executable, "-m", "noria", "export", output, target, FOLLOW]
    with subprocess.Popen(forked(arguments), stderr=subprocess.PIPE, text=True) as process:
        process.stderr.readline()
        assert main(small_run.command(folder, output, "--seal-seconds", "0", "--limit", "5")) == 0
        assert process.wait(20) == 0
    assert len(ids(target)) == 5
    with subprocess.Popen(forked(arguments), stderr=subprocess.PIPE, text=True) as process:
        assert process.wait(20) == 0, "the output of the first five is whole"
    assert main(small_run.command(folder, output, "--seal-seconds", "0")) == 0
    assert main(list(map(str, arguments[3:]))) == 0
    export(output, tmp_path / "all.jsonl")
    assert sorted(target.read_bytes().splitlines()) == sorted((tmp_path / "all.jsonl").read_bytes().splitlines())


WRITER = """
import os, random, sys, time
sys.path.insert(0, sys.argv[3])
from noria.output.compact import Compactor
from noria.output.merge import merge
from noria.output.parts import Parts
from output_rows import make_row
output, count = sys.argv[1], int(sys.argv[2])
parts = Parts(output, {"prompts": "ab12 of 5 bytes", "dtype": "float32"}, report=lambda line: None)
compactor, finished = Compactor(parts, 4), parts.finished()
left = [row for row in range(count) if (row, 0) not in finished]
random.shuffle(left)
while left:
    for row in left[:3]:
        parts.add(make_row(row, status="error" if row % 7 == 0 else "done", num_tokens=50))
    del left[:3]
    time.sleep(0.03)
    parts.seal()
    compactor.compact_if_due()
while not os.path.exists(output + ".go"):
    time.sleep(0.01)
merge(parts, output, count, {}, {})
"""


@pytest.mark.slow
def test_kills_of_both_sides_lose_no_row_and_repeat_none(output, target):
    """The run's side and the follower are killed at random moments, again and again."""
    number, num_rows, draw = count(30), 15 * count(30), random.Random(5)
    follower = [sys.executable, "-m", "noria", "export", output, target, FOLLOW]
    writer = [sys.executable, "-c", WRITER, output, num_rows, os.path.dirname(__file__)]
    kills = {"run": 0, "follower": 0}
    running = {}
    commands = {"run": writer, "follower": follower}
    while min(kills.values()) < number:
        for name, one in commands.items():
            if name not in running or running[name].poll() is not None:
                running[name] = subprocess.Popen(forked(one), stderr=subprocess.DEVNULL)
        time.sleep(draw.uniform(0.05, 0.5))
        for name in draw.sample(sorted(commands), draw.randrange(1, 3)):
            if running[name].poll() is None:
                running[name].kill()
                running[name].wait()
                kills[name] += 1
    output.with_name("run.h5.go").touch()  # the output is put together: killed once in the midst of that
    time.sleep(0.1)
    if running["run"].poll() is None:
        running["run"].kill()
        running["run"].wait()
    while not output.exists():
        if running["run"].poll() is not None:
            running["run"] = subprocess.Popen(forked(writer), stderr=subprocess.DEVNULL)
        running["run"].wait(200)
    if running["follower"].poll() is None:
        running["follower"].wait(200)
    assert subprocess.run(forked(follower), timeout=60, check=False).returncode == 0
    expected = [make_row(row, status="error" if row % 7 == 0 else "done", num_tokens=50) for row in range(num_rows)]
    assert sorted(target.read_bytes().splitlines()) == sorted(lines_of(expected).splitlines())
    assert min(kills.values()) >= number, kills


def test_follow_lets_time_pass_only_while_rows_are_to_come(output, target):
    parts = Parts(output, HEADER)
    fill(parts, [make_row(0)], 1)
    waits = []

    def wait():
        waits.append(1)
        if len(waits) == 3:
            merge(parts, output, 1, {}, {})
        return len(waits) < 5

    with GrowingFile(target) as file:
        assert follow(following(output, file), wait)
    assert len(waits) == 3 and ids(target) == ["row-0"]
