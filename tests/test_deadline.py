"""Walltimes as people and schedulers write them, and who is asked."""

import time

import pytest

from noria.errors import InputError
from noria.launch.deadline import NONE, find, job_id, seconds_of
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
    ("text", "seconds"), [("02:00:00", 7200), ("5:30", 330), ("90", 90), (90, 90), ("1:00:00", 3600), (" 10 ", 10)]
)
def test_a_walltime_is_hours_minutes_and_seconds_or_seconds(text, seconds):
    assert parse_walltime(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "1h", "-5", "1:2:3:4", "0", "0:00", "1.5", "٣"])
def test_what_is_no_walltime_is_refused(text):
    with pytest.raises(InputError, match=r"job\.walltime is .*: it must be HH:MM:SS, such as 03:30:00, or seconds"):
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


def test_the_job_is_named_as_the_scheduler_names_it():
    assert job_id({"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "11", "SLURM_ARRAY_TASK_ID": "3"}) == "11_3"
    assert job_id({"SLURM_JOB_ID": "12"}) == "12" and job_id({"PBS_JOBID": "9[2].node1"}) == "9[2].node1"
    assert job_id({}) == ""
