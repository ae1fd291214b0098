"""Builds checkpoints that lie: bytes of a header changed, with the header's checksum made right again.

Knows the layout of HDF5's object headers of version 2 (HDF5 file format, IV.A.1.b), and nothing of Noria.
"""

import struct
from pathlib import Path

import h5py

MASK = 0xFFFFFFFF


def header_of(path: Path, name: str) -> tuple[int, int]:
    """Where the object header of `name` begins and where its checksum lies."""
    with h5py.File(path) as file:
        begin = h5py.h5o.get_info(file[name].id).addr
    content = path.read_bytes()
    assert content[begin : begin + 5] == b"OHDR\2", content[begin : begin + 5]
    flags = content[begin + 5]
    at = begin + 6 + (16 if flags & 0x20 else 0) + (4 if flags & 0x10 else 0)
    width = 1 << (flags & 3)
    size = int.from_bytes(content[at : at + width], "little")
    return begin, at + width + size


def patch(path: Path, name: str, old: bytes, new: bytes) -> None:
    """Replaces every `old`, which must be there, by `new` of the same length in the header of `name`."""
    content, found = bytearray(path.read_bytes()), 0
    for begin, end in pieces(bytes(content), *header_of(path, name)):
        piece = bytes(content[begin:end])
        if old in piece:
            found += piece.count(old)
            content[begin:end] = piece.replace(old, new)
            content[end : end + 4] = struct.pack("<I", lookup3(bytes(content[begin:end])))
    assert found and len(old) == len(new), (name, old)
    path.write_bytes(content)


def repaired(content: bytes) -> bytes:
    """The file with the checksum of every object header's first piece made right."""
    content, begin = bytearray(content), content.find(b"OHDR\2")
    while begin >= 0:
        flags = content[begin + 5]
        at = begin + 6 + (16 if flags & 0x20 else 0) + (4 if flags & 0x10 else 0)
        width = 1 << (flags & 3)
        end = at + width + int.from_bytes(content[at : at + width], "little")
        if end + 4 <= len(content):
            content[end : end + 4] = struct.pack("<I", lookup3(bytes(content[begin:end])))
        begin = content.find(b"OHDR\2", begin + 1)
    return bytes(content)


def pieces(content: bytes, begin: int, end: int) -> list[tuple[int, int]]:
    """A header's own piece and those in which it goes on, each up to its checksum."""
    found = [(begin, end)]
    for first, last in found:
        at = content.find(b"OCHK")
        while at >= 0:
            place = content.find(number(at), first, last)
            if place >= 0:
                length = int.from_bytes(content[place + 8 : place + 16], "little")
                found.append((at, at + length - 4))
            at = content.find(b"OCHK", at + 1)
    return found


def number(value: int) -> bytes:
    return struct.pack("<Q", value)


def lookup3(key: bytes) -> int:
    """Bob Jenkins's hashlittle, with which HDF5 checks its metadata."""
    a = b = c = (0xDEADBEEF + len(key)) & MASK
    while len(key) > 12:
        x, y, z = struct.unpack_from("<III", key)
        a, b, c = (a + x) & MASK, (b + y) & MASK, (c + z) & MASK
        for turn in (4, 6, 8, 16, 19, 4):
            a = (a - c) & MASK
            a ^= _turn(c, turn)
            c = (c + b) & MASK
            a, b, c = b, c, a
        key = key[12:]
    if not key:
        return c
    x, y, z = struct.unpack("<III", key.ljust(12, b"\0"))
    a, b, c = (a + x) & MASK, (b + y) & MASK, (c + z) & MASK
    for turn in (14, 11, 25, 16, 4, 14, 24):
        c ^= b
        c = (c - _turn(b, turn)) & MASK
        a, b, c = b, c, a
    return b


def _turn(word: int, bits: int) -> int:
    return ((word << bits) | (word >> (32 - bits))) & MASK
