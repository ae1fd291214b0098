"""Walltimes as people and schedulers write them, and who is asked."""

import time

import pytest

from noria.errors import InputError
from noria.launch.deadline import NONE, find
from noria.launch.schedulers import job_id, seconds_of
from noria.tools.values import parse_walltime

BEGAN = 1_700_000_000.0
QSTAT = """Job Id: 17.node1
    Job_Name = gen
    resources_used.walltime = 00:01:40
    Resource_List.select = 1:ncpus=4:mpiprocs=4:ngpus=2
    Resource_List.walltime = 04:00:00
    stime = {stime}
    Variable_List = PBS_O_HOME=/home/one,PBS_O_PATH=/usr/local/bin:/usr/bin:/bin,
\tPBS_O_WORKDIR=/home/one/work
"""


def asked(answers):
    """A scheduler that answers so; the commands that it was asked."""
    commands = []

    def ask(command):
        commands.append(command)
        return answers.get(command[0], "")

    return ask, commands


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("02:00:00", 7200),
        ("5:30", 330),
        ("90", 90),
        (90, 90),
        ("1:00:00", 3600),
        (" 10 ", 10),
        ("1-00:00:00", 86_400),
        ("2-03:04:05", 183_845),
        ("1-12", 129_600),
        ("0-00:30", 1800),
        ("UNLIMITED", float("inf")),
        ("infinite", float("inf")),
    ],
)
def test_a_walltime_is_days_hours_minutes_and_seconds_or_seconds_or_unlimited(text, seconds):
    assert parse_walltime(text) == seconds


@pytest.mark.parametrize(
    "text",
    ["", "soon", "1h", "-5", "1:2:3:4", "0", "0:00", "1.5", "٣", "-", "1-", "-1:00", "1-2-3", "0-00:00:00", "NOT_SET"],
)
def test_what_is_no_walltime_is_refused(text):
    with pytest.raises(InputError, match=r"job\.walltime is .*: it must be HH:MM:SS, such as 03:30:00 or 1-00:00:00, "):
        parse_walltime(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1-02:03:04", 93784),
        ("02:03:04\n", 7384),
        ("3:04", 184),
        ("59", 59),
        ("UNLIMITED", None),
        ("", None),
        ("INVALID", None),
    ],
)
def test_times_of_schedulers_may_have_days_or_be_words(text, seconds):
    assert seconds_of(text) == seconds


def test_the_own_walltime_counts_from_the_start_unless_the_scheduler_ends_the_job_earlier():
    ask, _ = asked({})
    found = find("00:10:00", BEGAN, {"SLURM_JOB_ID": "5"}, ask)
    assert (found.at, found.source) == (BEGAN + 600, "walltime 00:10:00")
    found = find("00:10:00", BEGAN, {"SLURM_JOB_ID": "5", "SLURM_JOB_END_TIME": str(int(BEGAN) + 60)}, ask)
    assert (found.at, found.source) == (BEGAN + 60, "SLURM_JOB_END_TIME")


def test_slurm_says_its_end_by_a_variable_or_is_asked():
    ask, commands = asked({"squeue": "1:00:30\n"})
    assert find(None, BEGAN, {"SLURM_JOB_ID": "5", "SLURM_JOB_END_TIME": "1800000000"}, ask).at == 1_800_000_000
    assert commands == []
    found = find(None, BEGAN, {"SLURM_JOB_ID": "5"}, ask)
    assert abs(found.at - time.time() - 3630) < 5 and found.source == "squeue"
    assert commands == [["squeue", "-h", "-j", "5", "-o", "%L"]]


@pytest.mark.parametrize(
    ("said", "left"),
    [
        ("1:00:00\n59:30\n", 3570),  # tasks of an array, or components of a heterogeneous job
        ("59:30\n1-00:00:00\nUNLIMITED\n", 3570),
        ("INVALID\n10:00\n", 600),
        ("UNLIMITED\nUNLIMITED\n", None),
    ],
)
def test_of_the_lines_of_an_array_or_a_heterogeneous_job_the_shortest_time_counts(said, left):
    ask, commands = asked({"squeue": said})
    found = find(None, BEGAN, {"SLURM_JOB_ID": "36", "SLURM_ARRAY_JOB_ID": "36", "SLURM_ARRAY_TASK_ID": "1"}, ask)
    assert commands == [["squeue", "-h", "-j", "36_1", "-o", "%L"]]
    assert found == NONE if left is None else abs(found.at - time.time() - left) < 5


def test_a_shell_that_outlived_its_job_is_told_so_and_what_to_do():
    variables = {"SLURM_JOB_ID": "36", "SLURM_JOB_END_TIME": str(int(BEGAN) - 3000)}
    for said in ("", "slurm_load_jobs error: Invalid job id specified\n"):
        with pytest.raises(InputError) as refused:
            find("10:00", BEGAN, variables, asked({"squeue": said})[0])
        assert str(refused.value) == (
            "SLURM_JOB_END_TIME says that job 36 was over at 2023-11-14T21:23:20Z, 3,000 s before this run began: this shell"
            " outlived its job (tmux, screen). Start the run in a new job, or first: unset ${!SLURM_@}"
        )
    with pytest.raises(InputError, match=r"job \? was over"):
        find(None, BEGAN, {"SLURM_JOB_END_TIME": "1000"}, asked({})[0])


def test_a_job_whose_time_was_made_longer_has_the_time_that_squeue_says():
    variables = {"SLURM_JOB_ID": "36", "SLURM_JOB_END_TIME": str(int(BEGAN) - 3000)}
    found = find(None, BEGAN, variables, asked({"squeue": "2:00:00\n"})[0])
    assert abs(found.at - time.time() - 7200) < 5 and found.source == "squeue"
    assert find(None, BEGAN, variables, asked({"squeue": "UNLIMITED\n"})[0]) == NONE


def test_an_unlimited_walltime_leaves_the_schedulers_limit():
    assert find("UNLIMITED", BEGAN, {}).at == float("inf")
    found = find("UNLIMITED", BEGAN, {"SLURM_JOB_END_TIME": str(int(BEGAN) + 60)})
    assert (found.at, found.source) == (BEGAN + 60, "SLURM_JOB_END_TIME")


def test_pbs_is_asked_when_the_job_began_and_how_long_it_may_take():
    began = time.time() - 1000
    stime = time.strftime("%a %b %d %H:%M:%S %Y", time.localtime(began))
    ask, commands = asked({"qstat": QSTAT.format(stime=stime)})
    found = find(None, time.time(), {"PBS_JOBID": "17.node1"}, ask)
    assert abs(found.at - (began + 4 * 3600)) < 2 and commands == [["qstat", "-f", "17.node1"]]
    found = find(None, time.time(), {"PBS_JOBID": "17.node1"}, asked({"qstat": QSTAT.format(stime="?")})[0])
    assert abs(found.at - (time.time() - 100 + 4 * 3600)) < 2, "without its start by the time that it has used"


@pytest.mark.parametrize("environment", [{}, {"SLURM_JOB_ID": "5"}, {"PBS_JOBID": "5"}])
def test_without_an_answer_there_is_no_deadline(environment):
    assert find(None, BEGAN, environment, asked({"squeue": "UNLIMITED\n"})[0]) == NONE


def test_a_command_that_is_not_there_or_fails_is_no_answer(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert find(None, BEGAN, {"SLURM_JOB_ID": "5"}) == NONE


def test_bytes_of_the_jobs_environment_that_are_no_text_hide_no_answer(monkeypatch, tmp_path):
    (tmp_path / "qstat").write_bytes(
        b"#!/bin/sh\ncat << END\n    Resource_List.walltime = 01:00:00\n    resources_used.walltime = 00:10:00\n"
        b"    Variable_List = PBS_O_HOME=/home/m\xfcller,PBS_O_LANG=C\nEND\n"
    )
    (tmp_path / "qstat").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    found = find(None, BEGAN, {"PBS_JOBID": "17.node1"})
    assert abs(found.at - time.time() - 3000) < 30 and found.source == "qstat"


def test_the_job_is_named_as_the_scheduler_names_it():
    assert job_id({"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "11", "SLURM_ARRAY_TASK_ID": "3"}) == "11_3"
    assert job_id({"SLURM_JOB_ID": "12"}) == "12" and job_id({"PBS_JOBID": "9[2].node1"}) == "9[2].node1"
    assert job_id({}) == ""
