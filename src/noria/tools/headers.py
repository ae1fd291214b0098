"""How long a text in an attribute says that it is, read from the file's own structures before HDF5 is asked for it.

HDF5 gives a text of variable length as much memory as the file says it needs, and offers no way to ask first. Knows what
HDF5 writes by default: object headers with few attributes inside, or many in a heap (HDF5 file format, III.G and IV.A).
"""

import os
import struct
from collections.abc import Iterator

_ATTRIBUTE, _CONTINUATION, _ATTRIBUTE_INFO = 0x0C, 0x10, 0x15  # types of messages
_MAX_PIECES = 64  # of a header or a heap
_MAX_PIECE_NBYTES = 16 << 20
_NOWHERE = 2**62  # no file is so long


def text_nbytes(fd: int, address: int, name: str) -> int | None:
    """Bytes of the text of variable length that is the attribute `name` of the object whose header begins at `address`.

    The most of them, if the heap still has an older value of it. None where this file finds no such attribute.
    """
    wanted, found = name.encode() + b"\0", []
    for kind, data in _messages(fd, address):
        if kind == _ATTRIBUTE:
            found += _lengths(data, 0, wanted)
        elif kind == _ATTRIBUTE_INFO and len(data) >= 12:
            heap = struct.unpack_from("<Q", data, 4 if data[1] & 1 else 2)[0]
            found += [length for block in _blocks(fd, heap) for length in _search(block, wanted)]
    return max(found, default=None)


def _search(block: bytes, wanted: bytes) -> Iterator[int]:
    """The lengths that attributes of this name say in a block of a heap, wherever they lie in it."""
    at = block.find(wanted)
    while at >= 0:
        for before in (8, 9):
            yield from _lengths(block, at - before, wanted)
        at = block.find(wanted, at + 1)


def _lengths(data: bytes, at: int, wanted: bytes) -> list[int]:
    """The length that the attribute message at this place says, if there is one and it has this name.

    Version 1 pads name, type and space to 8 bytes each; version 3 says the name's character set before it.
    """
    if at < 0 or len(data) < at + 9 or data[at] not in (1, 2, 3):
        return []
    version, name = data[at], at + 8 + (data[at] == 3)
    sizes = struct.unpack_from("<HHH", data, at + 2)
    value = name + sum(-(-size // 8) * 8 if version == 1 else size for size in sizes)
    if data[name : name + sizes[0]] != wanted or len(data) < value + 4:
        return []
    return [struct.unpack_from("<I", data, value)[0]]


def _messages(fd: int, address: int) -> Iterator[tuple[int, bytes]]:
    """(type, data) of the messages of a header, also of the pieces in which it goes on."""
    start = _read(fd, address, 34)
    old = start[:2] == b"\1\0"
    if len(start) < 16 or not (old or start[:5] == b"OHDR\2"):
        return
    flags = 0 if old else start[5]
    if old:
        pieces = [(address + 16, int.from_bytes(start[8:12], "little"))]
    else:
        at, width = 6 + (16 if flags & 0x20 else 0) + (4 if flags & 0x10 else 0), 1 << (flags & 3)
        pieces = [(address + at + width, int.from_bytes(start[at : at + width], "little"))]
    # Bytes of a message's type, and before its data.
    kind_nbytes, before = (2, 8) if old else (1, 6 if flags & 4 else 4)
    for begin, nbytes in pieces:  # grows while it is walked
        content, place = _read(fd, begin, nbytes), 0
        while place + before <= len(content):
            kind = int.from_bytes(content[place : place + kind_nbytes], "little")
            size = int.from_bytes(content[place + kind_nbytes : place + kind_nbytes + 2], "little")
            data = content[place + before : place + before + size]
            place += before + size
            if kind == _CONTINUATION and len(data) == 16 and len(pieces) < _MAX_PIECES:
                block, length = struct.unpack("<QQ", data)
                pieces.append((block, length) if old else (block + 4, length - 8))  # between a signature and a checksum
            yield kind, data


def _blocks(fd: int, address: int) -> Iterator[bytes]:
    """The direct blocks of a fractal heap, in which attributes lie that are too many for a header."""
    heap = _read(fd, address, 142)
    if len(heap) < 142 or heap[:5] != b"FRHP\0":
        return
    width, size, most, bits, _, root, rows = struct.unpack_from("<HQQHHQH", heap, 110)
    if rows == 0:
        yield _read(fd, root, size)
        return
    first = 4 + 1 + 8 + (bits + 7) // 8  # of the indirect block: signature, version, heap's address, offset
    table = _read(fd, root, first + 8 * rows * width)
    for number in range(min(rows * width, (len(table) - first) // 8, _MAX_PIECES)):
        nbytes = size << max(number // max(width, 1) - 1, 0)
        if nbytes <= most:
            yield _read(fd, struct.unpack_from("<Q", table, first + 8 * number)[0], nbytes)


def _read(fd: int, offset: int, nbytes: int) -> bytes:
    """As much of it as the file has; nothing at a place that no file has."""
    return os.pread(fd, min(nbytes, _MAX_PIECE_NBYTES), offset) if 0 <= offset < _NOWHERE and nbytes > 0 else b""
