"""Extents of a file filled by large writes of threads: every byte at its place, past the page cache or through it."""

import os

import numpy as np
import pytest

from noria.checkpoint import filling
from noria.checkpoint.filling import ExtentWriter
from noria.tools import direct
from noria.tools.writing import WriteError


@pytest.fixture(params=["direct", "through the cache"])
def small(request, monkeypatch):
    monkeypatch.setattr(filling, "PIECE_NBYTES", 16384)
    if request.param != "direct":
        monkeypatch.setattr(direct, "_open_direct", lambda descriptor, writable: None)


def filled(path, chunks):
    """What a file of 300,000 bytes has when it is filled with (offset, bytes)."""
    path.write_bytes(bytes(300_000))
    descriptor = os.open(path, os.O_RDWR)
    buffer = bytearray(1 << 17)
    try:
        with ExtentWriter(path, descriptor) as its:
            for offset, content in chunks:
                buffer[: len(content)] = content  # one memory for all, as readers have it
                its.put(offset, memoryview(buffer)[: len(content)])
    finally:
        os.close(descriptor)
    return path.read_bytes()


@pytest.mark.parametrize("sizes", [[4096] * 20, [100, 3996, 50_000, 1, 12_287, 4096], [65_536, 16_384]])
def test_every_byte_comes_to_its_place(tmp_path, small, sizes):
    random, expected = np.random.default_rng(0), bytearray(300_000)
    chunks, at = [], 8192
    for number, size in enumerate(sizes * 2):
        at += 40_960 - at % 4096 if number == len(sizes) else 0  # an extent of its own
        chunks.append((at, random.bytes(size)))
        expected[at : at + size] = chunks[-1][1]
        at += size
    assert filled(tmp_path / "file", chunks) == bytes(expected)


def test_a_disk_that_takes_no_more_is_told_with_the_file(tmp_path, small, monkeypatch):
    def full(descriptor, buffers, offset):
        if offset >= 32_768:
            raise OSError(28, "No space left on device")
        return right(descriptor, buffers, offset)

    right = os.pwritev
    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(WriteError, match=r"file: no space left on device, 16,384 more bytes were to be written"):
        filled(tmp_path / "file", [(at, bytes(4096)) for at in range(0, 200_000, 4096)])


def test_what_ends_it_is_raised_as_it_is(tmp_path, small):
    def chunks():
        yield 0, b"1" * 4096
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        filled(tmp_path / "file", chunks())
