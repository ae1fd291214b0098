import os
import resource
from contextlib import contextmanager

import numpy as np
import pytest

import small_run
from noria.__main__ import main
from noria.errors import InputError
from noria.tools.atomic import GuardedFile, write_whole


@contextmanager
def small_disk():
    """A disk that takes 1000 bytes a file. Not a fixture: the log of the tests is a file too."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


@pytest.mark.parametrize("seed", range(5))
def test_what_a_full_disk_did_not_take_reads_back_as_it_was_written(tmp_path, seed):
    random, expected = np.random.default_rng(seed), bytearray()
    with small_disk(), GuardedFile(tmp_path / "file") as file:
        for _ in range(60):
            offset, data = int(random.integers(0, 3000)), random.bytes(int(random.integers(1, 400)))
            expected += bytes(max(0, offset + len(data) - len(expected)))
            expected[offset : offset + len(data)] = data
            file.seek(offset)
            assert file.write(data) == len(data) and file.tell() == offset + len(data)
        assert file.seek(0, os.SEEK_END) == len(expected)
        for _ in range(60):
            offset, buffer = int(random.integers(0, len(expected))), bytearray(b"x" * 500)
            file.seek(offset)
            count = file.readinto(buffer)
            assert buffer[:count] == expected[offset : offset + 500] and count == min(500, len(expected) - offset)
        with pytest.raises(OSError, match="file too large, .* a file of this process may have 1,000: make room"):
            file.check("make room")


def test_a_disk_with_room_is_written_to_and_truncated(tmp_path):
    with GuardedFile(tmp_path / "file") as file:
        file.write(b"0123456789")
        file.truncate(4)
        file.check("")
    assert (tmp_path / "file").read_bytes() == b"0123"


@pytest.mark.parametrize("name", ["pipe", "link"])
def test_a_device_or_a_pipe_is_never_replaced_by_a_file(tmp_path, name):
    """As root one would put a file in the place of /dev/null."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    with pytest.raises(
        InputError, match=r"pipe is a device or a pipe, which cannot be replaced by a file: name a file"
    ):
        write_whole(tmp_path / name, b"text")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pipe"] and (tmp_path / "pipe").is_fifo()


def test_every_command_that_writes_refuses_a_device_or_a_pipe(tmp_path, capsys):
    small_run.write_files(tmp_path)
    os.mkfifo(tmp_path / "pipe.h5")
    pipe = str(tmp_path / "pipe.h5")
    commands = [
        ["probe", "--output", pipe],
        ["convert", str(tmp_path / "hf"), pipe, "--overwrite"],
        ["merge", pipe, str(tmp_path / "other.h5")],
        small_run.command(tmp_path, "pipe.h5"),
        small_run.command(tmp_path, "out.h5", "--trace", pipe),
    ]
    for command in commands:
        assert main(command) == 2
        assert "is a device or a pipe, which cannot be replaced by a file" in capsys.readouterr().err, command
    assert (tmp_path / "pipe.h5").is_fifo()
