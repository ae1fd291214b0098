import os
import signal
from pathlib import Path

import h5py
import numpy as np
import pytest

from noria.errors import InputError
from noria.tools import looking, looking_child
from noria.tools.helper_process import Limits
from noria.tools.looking import Looker


def with_zeros(path):
    """An HDF5 file with an attribute in a heap of which HDF5 reads the end for ever."""
    with h5py.File(path, "w") as file:
        for number in range(40):
            file.attrs[f"said {number}"] = f"text {number} " * 8
    content = bytearray(path.read_bytes())
    at = content.index(b"GCOL") + 1024
    content[at : at + 512] = bytes(512)
    path.write_bytes(content)
    return path


@pytest.fixture
def looker(monkeypatch):
    monkeypatch.setattr(looking, "LIMITS", Limits(2**32, 1, 120, 2**20, opens_files=True))
    with Looker() as looker:
        yield looker


def whole(path):
    with h5py.File(path, "w") as file:
        file["folder/numbers"] = np.arange(10)
        file.attrs["said"] = "text"
    return path


@pytest.mark.slow
def test_a_file_on_which_hdf5_never_ends_is_named_and_the_next_one_is_looked_at(looker, tmp_path):
    for name in ("a.h5", "b.h5"):
        with pytest.raises(InputError, match=rf"{name} is damaged: HDF5 cannot read it \(it took more than 1 s"):
            looker.look(with_zeros(tmp_path / name))
    looker.look(whole(tmp_path / "whole.h5"))


def test_a_file_that_ends_the_process_is_named(looker, tmp_path):
    looker.look(whole(tmp_path / "whole.h5"))
    os.kill(looker._helper.pid, signal.SIGSEGV)
    os.waitid(os.P_PID, looker._helper.pid, os.WEXITED | os.WNOWAIT)
    looker.look(tmp_path / "whole.h5")


def test_a_whole_file_and_one_that_is_no_hdf5_are_the_parents_to_read(looker, tmp_path):
    looker.look(whole(tmp_path / "whole.h5"))
    looker.read(tmp_path / "whole.h5", "folder/numbers", 2, 5)
    (tmp_path / "text").write_text("no HDF5")
    looker.look(tmp_path / "text")


def test_values_that_cannot_be_read_are_named(looker, tmp_path):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("numbers", data=np.arange(1000), chunks=(100,), compression="gzip")
        at = file["numbers"].id.get_chunk_info(3).byte_offset
    content = bytearray(path.read_bytes())
    content[at : at + 20] = bytes(20)
    path.write_bytes(content)
    looker.look(path)
    looker.read(path, "numbers", 0, 300)
    with pytest.raises(InputError, match=r"a\.h5 is damaged"):
        looker.read(path, "numbers", 300, 400)


def test_the_child_reads_what_only_its_user_may_and_needs_no_torch(looker, tmp_path):
    path = whole(tmp_path / "whole.h5")
    path.chmod(0o600)
    looker.look(path)
    assert "libtorch" not in Path(f"/proc/{looker._helper.pid}/maps").read_text()
    assert looking_child.answer({"path": str(path)}) is None
