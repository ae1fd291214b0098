"""Protocol buffers' wire format (protobuf.dev/programming-guides/encoding): the fields of a message. Knows no schema."""

import struct
from collections.abc import Iterator
from typing import TypeAlias

Value: TypeAlias = int | bytes  # of a whole number, its 64 bits with a sign; of four or eight fixed bytes, those
_FIXED = {1: 8, 5: 4}  # bytes by wire type


def fields(message: bytes) -> Iterator[tuple[int, Value]]:
    """(number, value) of each field. Raises ValueError for what is no message."""
    place = 0
    while place < len(message):
        tag, place = _varint(message, place)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, place = _varint(message, place)
            yield number, value - (1 << 64) if value >> 63 else value
            continue
        size = _FIXED.get(wire)
        if wire == 2:
            size, place = _varint(message, place)
        if size is None or place + size > len(message) or number == 0:
            raise ValueError(f"no field at byte {place}")
        yield number, message[place : place + size]
        place += size


def real(value: Value) -> float:
    """The number in four fixed bytes. Raises ValueError for anything else."""
    if not isinstance(value, bytes) or len(value) != 4:
        raise ValueError("no number of four bytes")
    found: float = struct.unpack("<f", value)[0]
    return found


def text(value: Value) -> str:
    """The text of a field. Raises ValueError for anything else."""
    if not isinstance(value, bytes):
        raise ValueError("no text")
    return value.decode()


def _varint(message: bytes, place: int) -> tuple[int, int]:
    """A whole number of 7 bits a byte, and the place behind it."""
    value = shift = 0
    while place < len(message) and shift < 70:
        byte = message[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value & (1 << 64) - 1, place
    raise ValueError(f"no number ends at byte {place}")
