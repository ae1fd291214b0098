import fcntl
import io
import pty
import shlex
import shutil
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from noria.tools import progress as progress_module
from noria.tools.progress import Progress, duration
from noria.tools.text import plural, printable, seconds_words, storable


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    """A terminal of `columns`, whose text can be read back; 0 is what Open MPI gives ranks of a job without a terminal."""

    def __init__(self, columns=80):
        super().__init__()
        self.master, self.slave = pty.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def isatty(self):
        return True

    def fileno(self):
        return self.slave


@pytest.fixture
def clock():
    return Clock()


def test_plain_lines_come_after_5_seconds_and_then_every_30(clock):
    stream = io.StringIO()
    progress = Progress(10_000, stream=stream, clock=clock)
    seen = []
    for second in range(100):
        clock.now = 1000 + second
        progress.add(rows=1, tokens=10)
        if len(stream.getvalue().splitlines()) > len(seen):
            seen.append(second)
    assert seen == [5, 35, 65, 95]


def test_a_plain_line_gives_rows_tokens_speed_and_time_left(clock):
    progress = Progress(64, stream=io.StringIO(), clock=clock)
    progress.add(rows=12, tokens=1234, prompt_tokens=300)
    clock.now += 30
    assert progress.line() == "12/64 rows  300 prompt tokens (10 tok/s), 1,234 generated (41 tok/s)  about 2 min left"


def test_no_time_left_is_guessed_before_a_row_is_finished(clock):
    progress = Progress(64, stream=io.StringIO(), clock=clock)
    progress.add(tokens=100)
    assert progress.line() == "0/64 rows  0 prompt tokens (0 tok/s), 100 generated (0 tok/s)", "no time has passed"
    clock.now += 10
    assert progress.line() == "0/64 rows  0 prompt tokens (0 tok/s), 100 generated (10 tok/s)"


def test_a_long_prefill_shows_its_tokens_and_the_time_left_by_the_work_left(clock):
    progress = Progress(4, stream=io.StringIO(), clock=clock, lengths=(24_000, 4))
    clock.now += 60
    progress.add(prompt_tokens=24_000)
    assert progress.line().endswith(
        "0/4 rows  24,000 prompt tokens (400 tok/s), 0 generated (0 tok/s)  about 3 min left"
    )


def test_the_time_left_is_that_of_the_tokens_left_and_not_of_the_rows(clock):
    """Rows of 100 and 50 tokens, the 10 shortest of which are finished first while the others are half-way."""
    progress = Progress(40, stream=io.StringIO(), clock=clock, lengths=(100, 50))
    clock.now += 100
    progress.add(rows=20, prompt_tokens=3000, tokens=1500, finished_tokens=1000)
    assert progress.line().endswith("about 33 s left"), "1,500 of 6,000 tokens, where 20 of 40 rows are left"
    progress = Progress(40, stream=io.StringIO(), clock=clock, lengths=(100, 50))
    clock.now += 100
    progress.add(rows=40, prompt_tokens=4000, tokens=2000, finished_tokens=2000)
    assert progress.line().endswith("about 0 s left")


def test_rows_that_end_early_do_not_hide_the_work_of_those_in_flight(clock):
    """Of 74 rows in flight three have ended after 2 tokens; the others go on to 64 or so."""
    progress = Progress(74, stream=io.StringIO(), clock=clock, lengths=(89, 64))
    clock.now += 5
    progress.add(rows=3, prompt_tokens=74 * 89, tokens=417, finished_tokens=6)
    left = 71 * (89 + 64) - (74 * 89 + 417 - 3 * (89 + 64))
    assert progress.line().endswith(f"about {5 * left / (74 * 89 + 417):.0f} s left") and left > 4000
    clock.now += 35
    progress.add(rows=70, tokens=2860, finished_tokens=3271)
    assert progress.line().endswith("about 0 s left"), (
        "one row is left, of 45 new tokens in the mean, 44 of which are there"
    )


def test_rows_of_an_earlier_run_count_as_rows_and_not_as_speed(clock):
    progress = Progress(100, num_finished=50, stream=io.StringIO(), clock=clock)
    progress.add(rows=10, tokens=100)
    clock.now += 10
    assert progress.line() == "60/100 rows  0 prompt tokens (0 tok/s), 100 generated (10 tok/s)  about 40 s left"


def test_a_terminal_gets_a_bar_and_no_plain_lines(clock):
    stream = Terminal()
    progress = Progress(64, num_finished=4, stream=stream, clock=clock)
    for _ in range(60):
        clock.now += 1
        progress.add(rows=1, tokens=20)
    progress.end("outputs/run.h5")
    assert "4/64 rows" in stream.getvalue() and "64/64 rows" in stream.getvalue()
    assert "0 prompt, 1,200 new, 20 tok/s, about 0 s left" in stream.getvalue()
    assert "  about" not in stream.getvalue(), "no plain line"
    assert stream.getvalue().endswith("output: outputs/run.h5\n")


def test_the_summary_of_a_finished_run(clock):
    stream = io.StringIO()
    progress = Progress(64, stream=stream, clock=clock)
    progress.add(rows=60, tokens=16_000, prompt_tokens=3456)
    progress.add(rows=4, errors=2)
    clock.now += 20
    progress.end("outputs/run.h5")
    assert stream.getvalue() == (
        "62 rows done, 2 with errors; 3,456 prompt tokens, 16,000 generated tokens in 20.0 s: 800 tok/s\n"
        "output: outputs/run.h5\n"
    )


def test_the_summary_of_a_run_that_stopped_says_what_is_left_and_how_to_go_on(clock):
    progress = Progress(10, num_finished=3, stream=io.StringIO(), clock=clock)
    progress.add(rows=1, tokens=1)
    clock.now += 1
    assert progress.summary("o.h5").splitlines() == [
        "1 row done, 0 with errors, 3 finished before; 0 prompt tokens, 1 generated token in 1.0 s: 1 tok/s",
        "stopped with 6 rows of 10 left: start the same run again to go on",
        "finished rows so far: o.h5.parts",
    ]


def test_adding_is_cheap(clock):
    progress = Progress(10**6, stream=io.StringIO(), clock=clock)
    for _ in range(100_000):
        progress.add(tokens=64)
    assert progress.stream.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (40, "40 s"), (120, "2 min"), (5400, "1.5 h"), (200_000, "2.3 days")]
)
def test_durations_are_rounded_to_what_a_guess_deserves(seconds, text):
    assert duration(seconds) == text


def test_text_for_files_and_terminals():
    assert storable("a\0b\ud800c\udfff😀") == "a\ufffdb\ufffdc\ufffd😀"
    assert printable("a\nb\x1b[0m\u202eé😀\\n") == "a\\nb\\x1b[0m\\u202eé😀\\n"
    assert (plural(1, "row"), plural(0, "row"), plural(1234, "row")) == ("1 row", "0 rows", "1,234 rows")


def test_a_terminal_without_a_width_gets_plain_lines(clock):
    stream = Terminal(columns=0)
    progress = Progress(10, stream=stream, clock=clock)
    clock.now += 6
    progress.add(rows=1, tokens=5)
    progress.close()
    assert stream.getvalue().startswith("1/10 rows")


@pytest.mark.parametrize(("errors", "output", "chosen"), [(80, 80, "stderr"), (0, 80, "stdout"), (0, 0, None)])
def test_the_bar_goes_to_the_stream_that_is_a_terminal_with_a_width(monkeypatch, errors, output, chosen):
    streams = {"stderr": Terminal(errors), "stdout": Terminal(output)}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    assert progress_module._terminal() is (streams[chosen] if chosen else None)


@pytest.mark.mpi
@pytest.mark.skipif(shutil.which("script") is None, reason="needs script, of bsdutils")
def test_under_mpirun_on_a_terminal_there_is_a_bar(tmp_path):
    draw = "from noria.tools.progress import Progress; p = Progress(10); p.add(rows=3); p.close()"
    environment = Path(__file__).parent.parent / "jobs" / "local" / "environment.sh"
    launch = f"source {environment}; stty rows 24 cols 90; timeout --foreground -k 5 30 mpirun -n 1 {sys.executable} -c '{draw}'"
    seen = subprocess.run(
        ["script", "-qec", f"bash -c {shlex.quote(launch)}", "/dev/null"], capture_output=True, text=True
    )
    assert "3/10 rows |" in seen.stdout
    piped = subprocess.run(["bash", "-c", launch.replace("stty rows 24 cols 90; ", "")], capture_output=True, text=True)
    assert "|" not in piped.stdout + piped.stderr


def test_seconds_in_words_have_no_exponent_and_the_unit_that_they_need():
    found = {seconds: seconds_words(seconds) for seconds in (0, 0.0613, 0.9994, 0.9996, 2.306, 119.6, 720, 12600)}
    expected = ["0 s", "61.3 ms", "999 ms", "1 s", "2.31 s", "120 s", "12.0 min", "3.5 h"]
    assert list(found.values()) == expected
