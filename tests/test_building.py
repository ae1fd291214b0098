"""Kernels of our own: where they are kept, and which rank of a node builds them first."""

import os
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from noria import attention, config, encodings
from noria.blocks import lay_out
from noria.encodings import _kernels, int4
from noria.launch import building
from noria.launch.here import ThisRank
from noria.launch.launcher import Location
from noria.launch.mpi import Solo
from noria.model import ModelShape
from noria.models import _fused
from noria.pieces import Encoded, Matrix
from noria.streams import streams_of
from test_launcher import RUN

SHAPE = ModelShape("llama", 1, 64, 4, 2, 16, 100, 100, False)
VARIABLES = ("NORIA_CACHE", "XDG_CACHE_HOME", "SLURM_TMPDIR", "TMPDIR", building.CACHE)


@pytest.fixture
def set_to(monkeypatch, tmp_path):
    """Sets these variables, and no others, to folders of tmp_path."""
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()

    def call(**variables):
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, folder in variables.items():
            monkeypatch.setenv(name, str(tmp_path / folder))

    return call


def folder(**keys):
    return building.cache_folder(config.load(None, RUN | keys))


def test_kernels_are_kept_where_the_user_or_the_scheduler_says_and_never_below_home(set_to, tmp_path):
    own = f"noria-triton-{os.getuid()}"
    set_to(NORIA_CACHE="a", XDG_CACHE_HOME="b", TMPDIR="c")
    assert folder() == tmp_path / "a" / "triton"
    set_to(XDG_CACHE_HOME="b", TMPDIR="c")
    assert folder() == tmp_path / "b" / "noria" / "triton"
    set_to(SLURM_TMPDIR="node", TMPDIR="c")
    assert folder() == tmp_path / "node" / own and (tmp_path / "node" / own).stat().st_mode & 0o777 == 0o700
    assert folder(scratch=str(tmp_path / "named")) == tmp_path / "named" / own
    set_to()
    assert folder() == tmp_path / "tmp" / own


def test_a_folder_that_cannot_be_written_to_is_passed_over(set_to, tmp_path):
    (tmp_path / "a").write_text("a file")
    set_to(NORIA_CACHE="a", TMPDIR="c")
    assert folder() == tmp_path / "c" / f"noria-triton-{os.getuid()}"


@pytest.mark.parametrize("harm", ["writable", "link", "of another"])
def test_kernels_are_not_taken_from_a_folder_that_others_may_have_filled(set_to, tmp_path, monkeypatch, harm):
    set_to(TMPDIR="c")
    found = folder()
    if harm == "writable":
        found.chmod(0o777)
    elif harm == "link":
        found.rmdir()
        (tmp_path / "theirs").mkdir()
        found.symlink_to(tmp_path / "theirs")
    else:
        monkeypatch.setattr(building.os, "getuid", lambda: 4711)
        (tmp_path / "c" / "noria-triton-4711").mkdir(mode=0o700)
    other = folder()
    assert other != found and other.name.startswith("noria-triton-") and other.stat().st_mode & 0o777 == 0o700
    other.rmdir()


def test_the_users_own_choice_for_triton_stays(set_to, tmp_path, monkeypatch):
    set_to(NORIA_CACHE="a", TRITON_CACHE_DIR="b")
    assert building.keep_kernels(config.load(None, RUN)) == str(tmp_path / "b") == os.environ[building.CACHE]
    set_to(NORIA_CACHE="a")
    assert building.keep_kernels(config.load(None, RUN)) == str(tmp_path / "a" / "triton") == os.environ[building.CACHE]


class Ranks(Solo):
    """A communicator that writes down when its rank meets the others, who found `others`."""

    def __init__(self, events, others=()):
        self.events, self.others = events, others

    def allgather(self, value):
        self.events.append("meets")
        return [value, *(self.others if isinstance(value, tuple) else [None])]


@pytest.mark.parametrize(
    ("local_rank", "order"), [(0, ["builds", "meets", "meets"]), (2, ["meets", "builds", "meets"])]
)
def test_one_rank_of_a_node_builds_first_and_the_others_wait(monkeypatch, local_rank, order, capsys):
    events, fitting = [], attention.fitting

    def builds(*given):
        events.append("builds")
        return fitting(*given)

    monkeypatch.setattr(attention, "fitting", builds)
    comm = Ranks(events, [("items", ""), ("items", "")])
    here = ThisRank(comm, Location("host", local_rank, 3), streams_of(torch.device("cpu")))
    building.build_attention(config.load(None, RUN), here, SHAPE, "float32")
    assert events == [*order, "meets"]
    said = capsys.readouterr().err.splitlines()
    assert "rank 0: attention sdpa: not items: it needs a CUDA device, this is the CPU" in said[0]
    assert said[1].endswith("rank 1: attention items") and len(said) == 2
    assert building.CACHE not in os.environ or Path(os.environ[building.CACHE]).exists()


@pytest.mark.parametrize("local_rank", [0, 1])
def test_encodings_whose_kernels_cannot_be_built_are_said(monkeypatch, local_rank):
    said, asked = [], []

    def decoder(name, device, dtype):
        asked.append((name, dtype))
        return None, "it cannot be built: no compiler" if name == "int4" else ""

    monkeypatch.setattr(_kernels, "decoder", decoder)
    own = {"comm": Solo(), "location": Location("host", local_rank, 2), "say": lambda *lines: said.extend(lines)}
    building.build_decoders(SimpleNamespace(device=torch.device("cpu"), **own), {"int4"}, "bfloat16")
    assert asked == []
    building.build_decoders(SimpleNamespace(device=torch.device("cuda"), **own), {"int4", "fp8_block"}, "bfloat16")
    assert asked == [("fp8_block", torch.bfloat16), ("int4", torch.bfloat16)]
    assert said == ["int4 is decoded by torch, slower than by its kernel: it cannot be built: no compiler"]


def test_weights_that_are_multiplied_as_they_are_stored_are_tried_on_gpus_and_each_rank_has_its_own(monkeypatch):
    said, asked = [], []

    def chosen(blocks, device, dtype, linear):
        asked.append((len(blocks), device.type, dtype, linear))
        return frozenset({"its kind"}), ["int4 is decoded"]

    monkeypatch.setattr(building.few_rows, "chosen", chosen)
    own = {"comm": Solo(), "rank": 0, "location": Location("host", 0, 1), "say": lambda *lines: said.extend(lines)}
    piece = encodings.capacity("int4", [Matrix("", (64, 64))], "bfloat16", int4.DEFAULTS)
    forms = {"out": Encoded("int4", int4.DEFAULTS, piece)}
    plain, encoded = ({"it": lay_out("layers/0000", {"out": (64, 64)}, "bfloat16", held)} for held in ({}, forms))
    for device, blocks in (("cpu", encoded), ("cuda", plain)):
        its = SimpleNamespace(device=torch.device(device), **own)
        assert building.build_stored(its, blocks, "bfloat16", F.linear) == () and asked == said == []
    its = SimpleNamespace(device=torch.device("cuda"), **own)
    assert building.build_stored(its, encoded, "bfloat16", F.linear) == {"its kind"}
    assert asked == [(1, "cuda", torch.bfloat16, F.linear)]
    assert said[0] == "int4 is decoded" and said[1].startswith(
        "few rows are multiplied with encoded weights as they are"
    )


@pytest.mark.parametrize("why", ["", "they cannot be built: no compiler"])
def test_kernels_between_products_are_built_on_gpus_and_it_is_said_where_they_are_not(monkeypatch, why):
    said, asked = [], []
    monkeypatch.setattr(_fused, "build", lambda shape, device, dtype: asked.append((device.type, dtype)) or why)
    own = {"comm": Solo(), "location": Location("host", 0, 1), "say": lambda *lines: said.extend(lines)}
    building.build_fused(SimpleNamespace(device=torch.device("cpu"), **own), SHAPE, "bfloat16")
    assert asked == said == []
    building.build_fused(SimpleNamespace(device=torch.device("cuda"), **own), SHAPE, "bfloat16")
    assert asked == [("cuda", torch.bfloat16)]
    what = "norms, rotary positions and gates by"
    assert said == [f"{what} torch, not by kernels: {why}"] if why else said[0].startswith(f"{what} kernels (")
