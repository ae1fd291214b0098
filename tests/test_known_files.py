"""A file is read as it was when it was hashed, or not at all."""

import io
import os

import numpy as np
import pytest
import xxhash

from counts import count
from noria import readers
from noria.errors import Changed
from noria.readers import _known, know
from noria.readers._known import KnownFile
from noria.rows.prompt_files import PromptFiles, Watch, content_hash, content_key, hashed


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(_known, "BLOCK_NBYTES", 100)


@pytest.mark.parametrize("nbytes", [0, 1, 99, 100, 101, 2345])
def test_any_piece_of_a_known_file_is_what_a_plain_file_gives(tmp_path, nbytes):
    random, path = np.random.default_rng(nbytes), tmp_path / "file"
    path.write_bytes(random.bytes(nbytes))
    known = know(str(path))
    assert (known.nbytes, known.hash) == (nbytes, xxhash.xxh3_128_hexdigest(path.read_bytes())) and known.is_same()
    with KnownFile(known) as ours, path.open("rb") as plain:
        for _ in range(60):
            place, size = int(random.integers(0, nbytes + 50)), int(random.integers(0, 400))
            whence = int(random.choice([os.SEEK_SET, os.SEEK_END]))
            place = place if whence == os.SEEK_SET else -min(place, nbytes)
            assert ours.seek(place, whence) == plain.seek(place, whence)
            assert ours.read(size) == plain.read(size) and ours.tell() == plain.tell()
    with io.BufferedReader(KnownFile(known), 64) as ours:
        assert ours.read() == path.read_bytes()


@pytest.mark.parametrize("seed", range(count(50)))
def test_no_byte_of_another_file_is_ever_read(tmp_path, seed):
    random, path = np.random.default_rng(seed), tmp_path / "file"
    whole = random.bytes(1234)
    path.write_bytes(whole)
    known, other = know(str(path)), bytearray(whole)
    for place in random.integers(0, len(whole), 3):
        other[place] ^= 1 << int(random.integers(0, 8))
    read = []
    with KnownFile(known) as file, pytest.raises(Changed, match="file changed while"):
        read.append(file.read(int(random.integers(1, 300))))
        with path.open("r+b") as written:
            written.write(other)
        while piece := file.read(int(random.integers(1, 300))):
            read.append(piece)
        assert not known.is_same() and False, "all was read before"
    assert whole.startswith(b"".join(read)) and not known.is_same()


def test_a_hashed_source_says_the_hash_and_size_of_its_files_without_reading_them(tmp_path):
    for name in ("a.jsonl", "b.txt"):
        (tmp_path / name).write_text(f'{{"prompt": "{name}"}}\n' * 70)
    for files in (("a.jsonl",), ("a.jsonl", "b.txt")):
        plain = PromptFiles(tuple(str(tmp_path / name) for name in files))
        expected = content_hash(plain), content_key(plain, content_hash(plain))
        source = hashed(plain)
        os.rename(tmp_path / "a.jsonl", tmp_path / "kept")
        assert (content_hash(source), content_key(source, content_hash(source))) == expected
        os.rename(tmp_path / "kept", tmp_path / "a.jsonl")


@pytest.fixture
def watched(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("a row\n" * 100)
    watch = Watch(hashed(PromptFiles((str(path),))))
    assert watch.changed() is None
    return path, watch


def test_a_touch_a_copy_and_other_names_of_the_same_bytes_are_no_change(watched, monkeypatch):
    path, watch = watched
    os.utime(path, ns=(1, 1))
    assert watch.changed() is None
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    os.replace(copy, path)
    assert watch.changed() is None
    monkeypatch.setattr(readers.Known, "is_same", lambda self: pytest.fail("it was looked at before"))
    assert watch.changed() is None


@pytest.mark.parametrize("how", ["overwritten", "replaced", "truncated", "appended", "removed", "a folder"])
def test_every_other_change_is_seen(watched, how):
    path, watch = watched
    if how == "overwritten":
        with path.open("r+") as file:
            file.write("A row")
        os.utime(path, ns=(2, 2))
    elif how == "replaced":
        path.with_name("new").write_text("b row\n" * 100)
        os.replace(path.with_name("new"), path)
    elif how == "truncated":
        os.truncate(path, 60)
    elif how == "appended":
        with path.open("a") as file:
            file.write("one more\n")
    else:
        path.unlink()
        if how == "a folder":
            path.mkdir()
    assert str(watch.changed()) == str(path)
