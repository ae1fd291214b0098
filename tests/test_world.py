"""The world that the tests share: what goes wrong in one call fails its own test, by name, and the next call goes on."""

import pytest
import world_faults

import world
from mpirun import FAULTS_OF_THE_MACHINE

pytestmark = [pytest.mark.world, pytest.mark.slow]


def test_a_call_gets_a_communicator_of_its_ranks_and_returns_what_each_of_them_did():
    assert world.call(3, world_faults.place, "a", "b") == [(0, 3, "a", "b"), (1, 3, "a", "b"), (2, 3, "a", "b")]
    assert world.call(1, world_faults.place) == [(0, 1)]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (world_faults.hang, "rank 0 did not end after 4 s"),
        (world_faults.crash, "rank 1 ended"),
        (world_faults.leak, "rank 1 left open file "),
        (world_faults.stay, "rank 1 left open thread left behind"),
        (world_faults.stumble, "ZeroDivisionError: division by zero"),
        (world_faults.abort, "rank 0 ended"),
    ],
)
def test_a_fault_fails_the_test_that_called_and_the_next_call_goes_on(fault, said, tmp_path):
    with pytest.raises(AssertionError) as caught:
        world.call(2, fault, tmp_path, timeout=4)
    assert f"world_faults.{fault.__name__} in the world" in str(caught.value) and said in str(caught.value)
    assert world.call(2, world_faults.place) == [(0, 2), (1, 2)]


def test_a_call_is_made_again_after_a_fault_of_the_machine_and_after_no_other(tmp_path):
    with pytest.warns(UserWarning, match="the machine's fault, tried again: The futex facility"):
        assert world.call(2, world_faults.abort_once, tmp_path, FAULTS_OF_THE_MACHINE[1]) == ["met", "met"]
    (tmp_path / "aborted").unlink()
    with pytest.raises(AssertionError, match="rank 1 ended"):
        world.call(2, world_faults.abort_once, tmp_path, "a fault of our own")


def test_a_command_of_the_world_says_and_returns_what_it_would_under_mpirun():
    done = world.command(2, ["export", "a.h5", "b.jsonl"])
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "noria: noria export is a program of one process: start it without mpirun (here 2 ranks)\n"
