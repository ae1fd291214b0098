import fcntl
import io
import pty
import shlex
import shutil
import struct
import subprocess
import sys
import termios
from dataclasses import replace
from pathlib import Path

import pytest

import test_costs
from noria.desk.pace import expected
from noria.plan.rounds import Workload
from noria.tools import progress as progress_module
from noria.tools.progress import Progress, duration
from noria.tools.text import plural, printable, seconds_words, storable
from noria.tools.work_left import Expected


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
    progress = Progress(64, stream=io.StringIO(), clock=clock, expected=Expected(25, 100, 0.0, 0.02))
    progress.add(rows=12, tokens=1234, prompt_tokens=300, finished_tokens=1200)
    clock.now += 30
    assert progress.line() == "12/64 rows  300 prompt tokens (10 tok/s), 1,234 generated (41 tok/s)  about 2 min left"


def test_no_time_left_is_guessed_where_no_step_was_seen_and_none_predicted(clock):
    progress = Progress(64, stream=io.StringIO(), clock=clock, expected=Expected(10, 10))
    progress.add(tokens=100)
    assert progress.line() == "0/64 rows  0 prompt tokens (0 tok/s), 100 generated (0 tok/s)", "no time has passed"
    clock.now += 10
    assert progress.line() == "0/64 rows  0 prompt tokens (0 tok/s), 100 generated (10 tok/s)"


def test_the_time_that_weights_load_is_no_time_of_the_first_tokens(clock):
    """400 prompts of 10,000 tokens and 20 new ones, of which the first chunk sets out after a minute of loading."""
    progress = Progress(400, stream=io.StringIO(), clock=clock, expected=Expected(10_000, 20, 2e-5, 1e-5))
    clock.now += 60
    progress.add(prompt_tokens=512)
    assert progress.line().endswith("about 80 s left"), "as planned: 4 M tokens at 50,000 a second"
    silent = Progress(400, stream=io.StringIO(), clock=clock, expected=Expected(10_000, 20))
    clock.now += 60
    silent.add(prompt_tokens=512)
    assert silent.line().endswith("0 generated (0 tok/s)"), "nothing is known"


def test_what_a_token_takes_is_what_the_plan_predicts():
    load = Workload(128, 512, 32)
    plan = test_costs.streamed(2)
    known = expected(plan, load)
    whole = 128 * (512 * known.prompt_seconds + 32 * known.new_seconds)
    assert whole == pytest.approx(plan.predicted["seconds"]) and known.groups == plan.groups
    assert expected(replace(plan, predicted={}), load).new_seconds is None


def test_long_prompts_are_no_measure_of_new_tokens(clock):
    """1,000 tokens of prompts a second and 10 new ones: half the prompts in, the answers are left as predicted."""
    progress = Progress(20, stream=io.StringIO(), clock=clock, expected=Expected(1000, 50, 0.002, 0.1))
    for _ in range(11):
        progress.add(prompt_tokens=1000)
        clock.now += 1
    progress.add()
    assert progress.line().endswith(f"about {duration(9 + 20 * 50 * 0.1)} left"), "9 s of prompts at the rate seen"
    for _ in range(9):
        progress.add(prompt_tokens=1000)
        clock.now += 1
    for _ in range(10):
        progress.add(tokens=20)
        clock.now += 1
    assert progress.line().endswith("about 40 s left"), "800 of 1,000 new tokens, 20 a second"


def test_steps_with_both_kinds_are_split_as_predicted(clock):
    progress = Progress(100, stream=io.StringIO(), clock=clock, expected=Expected(100, 10, 0.001, 0.01))
    for _ in range(11):
        progress.add(prompt_tokens=200, tokens=20)
        clock.now += 2
    assert progress.line().endswith(f"about {duration(78 * 0.5 + 780 * 0.05)} left"), "five times what was predicted"


def test_the_steps_that_fill_the_ring_count_for_nothing(clock):
    progress = Progress(40, stream=io.StringIO(), clock=clock, expected=Expected(100, 1, groups=3))
    for _ in range(3):
        progress.add(prompt_tokens=100)
    clock.now += 30  # the way round the ring and what is loaded in it
    for _ in range(7):
        progress.add(prompt_tokens=100)
        clock.now += 1
    assert not progress.line().endswith("left"), "nothing is known of new tokens"
    progress.add(tokens=30)
    for _ in range(8):
        clock.now += 1
        progress.add(tokens=1)
    assert progress.line().endswith("about 70 s left"), (
        "30 prompts and 40 tokens, a second each, and nothing of the 30 s"
    )


def test_the_time_left_is_that_of_the_tokens_left_and_not_of_the_rows(clock):
    """Rows of 100 and 50 tokens, the 10 shortest of which are finished first while the others are half-way."""
    known = Expected(100, 50, 0.01, 0.02)
    progress = Progress(40, stream=io.StringIO(), clock=clock, expected=known)
    progress.add(rows=20, prompt_tokens=3000, tokens=1500, finished_tokens=1000)
    assert progress.line().endswith("about 20 s left"), (
        "1,000 tokens of prompts and 500 new ones, where 20 of 40 rows are left"
    )
    progress = Progress(40, stream=io.StringIO(), clock=clock, expected=known)
    progress.add(rows=40, prompt_tokens=4000, tokens=2000, finished_tokens=2000)
    assert progress.line().endswith("about 0 s left")


def test_rows_that_end_early_do_not_hide_the_work_of_those_in_flight(clock):
    """Of 74 rows in flight three have ended after 2 tokens; the others go on to 64 or so."""
    progress = Progress(74, stream=io.StringIO(), clock=clock, expected=Expected(89, 64, 0.001, 0.01))
    progress.add(rows=3, prompt_tokens=74 * 89, tokens=417, finished_tokens=6)
    assert progress.line().endswith(f"about {0.01 * (71 * 64 - (417 - 3 * 64)):.0f} s left")
    progress.add(rows=70, tokens=2860, finished_tokens=3271)
    assert progress.line().endswith("about 0 s left"), (
        "one row is left, of 45 new tokens in the mean, 44 of which are there"
    )


def test_rows_of_an_earlier_run_count_as_rows_and_not_as_speed(clock):
    known = Expected(0, 10, 0.0, 0.1)
    progress = Progress(100, num_finished=50, stream=io.StringIO(), clock=clock, expected=known)
    progress.add(rows=10, tokens=100, finished_tokens=100)
    clock.now += 10
    assert progress.line() == "60/100 rows  0 prompt tokens (0 tok/s), 100 generated (10 tok/s)  about 40 s left"


def test_a_terminal_gets_a_bar_and_no_plain_lines(clock):
    stream = Terminal()
    progress = Progress(64, num_finished=4, stream=stream, clock=clock, expected=Expected(0, 20, 0.0, 0.05))
    for _ in range(60):
        clock.now += 1
        progress.add(rows=1, tokens=20, finished_tokens=20)
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
    progress = Progress(10**6, expected=Expected(10, 10, 0.1, 0.1), stream=io.StringIO(), clock=clock)
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
