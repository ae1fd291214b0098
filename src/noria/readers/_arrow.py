"""Values of Arrow's types as JSON has them: objects, lists, texts, numbers. Knows neither files nor keys of a row.

A struct has all its keys in every row, so null says that one is not given: such keys are left out. Times, decimals and
UUIDs become the texts that Python gives them, to the nanosecond; bytes are text in UTF-8. pyarrow, an extra, is not
imported here.
"""

import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from noria.readers import BadRow

_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_EPOCH = datetime(1970, 1, 1)
# Types whose values pyarrow gives as JSON has them, and lists of these.
_PLAIN = ("null", "bool", "int", "uint", "float", "double", "string", "large_string")
_LISTS = ("list<", "large_list<", "fixed_size_list<")


def values(column: Any) -> list[Any]:
    """The values of a pyarrow.Array; for each that has no such form a BadRow, whose error goes on from a column's name."""
    kind = column.type
    while str(kind).startswith(_LISTS):
        kind = kind.value_type
    if str(kind).rstrip("0123456789") in _PLAIN:
        try:
            return column.to_pylist()
        except ValueError:  # one value alone is wrong: find out which
            pass
    return [_value_or_error(scalar) for scalar in column]


def _value_or_error(scalar: Any) -> Any:
    try:
        return _value(scalar)
    except UnicodeDecodeError as error:
        return BadRow(f"is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}")
    except (ValueError, ArithmeticError, LookupError, NotImplementedError, RecursionError) as error:
        return BadRow(f"cannot be read: {' '.join(str(error).split())[:200]}")


def _value(scalar: Any) -> Any:
    """The value of a pyarrow.Scalar as JSON has it. Raises ValueError, OverflowError."""
    if not scalar.is_valid:
        return None
    form = _FORMS.get(type(scalar).__name__)
    if form is not None:
        return form(scalar)
    value = scalar.as_py()
    if isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, bytes):
        return value.decode()
    if hasattr(scalar.type, "storage_type") and not isinstance(value, uuid.UUID):
        return _value(scalar.value)
    return str(value)


def _list(scalar: Any) -> list[Any]:
    return [_value(one) for one in scalar.values]


def _struct(scalar: Any) -> dict[str, Any]:
    names = [field.name for field in scalar.type]
    if len(set(names)) < len(names):
        raise ValueError(f"a struct has two fields of the same name: {', '.join(names)[:60]}")
    return {name: value for name, one in scalar.items() if (value := _value(one)) is not None}


def _map(scalar: Any) -> dict[str, Any] | list[Any]:
    """An object where all keys are texts or integers, as JSON writes them; else a list of pairs."""
    pairs = [[_value(one) for _, one in entry.items()] for entry in scalar.values]
    if not all(isinstance(key, str | int) and not isinstance(key, bool) for key, _ in pairs):
        return pairs
    found = {str(key): value for key, value in pairs}
    if len(found) < len(pairs):
        raise ValueError("a map has the same key twice")
    return found


def _timestamp(scalar: Any) -> str:
    time, nanoseconds = _after(_EPOCH, scalar)
    if scalar.type.tz is not None:
        time = _in_zone(time.replace(tzinfo=UTC), scalar.type.tz)
    return _precise(time.isoformat(" ", _timespec(time.microsecond, nanoseconds)), 26, nanoseconds)


def _in_zone(time: datetime, name: str) -> datetime:
    """The time as a zone (`Europe/Berlin`, `+01:00`) has it; in UTC, which is the same time, where this machine does not
    know the zone, or where its offset has seconds, as before 1900, which few programs read."""
    try:
        zone = datetime.fromisoformat(f"{_EPOCH}{name}").tzinfo if name[:1] in ("+", "-") else ZoneInfo(name)
    except (ValueError, LookupError, OSError):
        return time
    there = time.astimezone(zone)
    return time if (there.utcoffset() or timedelta()) % timedelta(minutes=1) else there


def _time_of_day(scalar: Any) -> str:
    time, nanoseconds = _after(_EPOCH, scalar)
    if time.date() != _EPOCH.date():
        raise ValueError(f"{scalar.value} {scalar.type.unit} is not a time of day")
    return _precise(time.time().isoformat(_timespec(time.microsecond, nanoseconds)), 15, nanoseconds)


def _duration(scalar: Any) -> str:
    time, nanoseconds = _after(timedelta(), scalar)
    text = str(time) + ".000000" * (nanoseconds > 0 and time.microseconds == 0)
    return _precise(text, len(text), nanoseconds)


def _after(start: Any, scalar: Any) -> tuple[Any, int]:
    """The scalar's time after `start`, and its nanoseconds, which Python's times lack. Raises OverflowError."""
    microseconds, nanoseconds = divmod(scalar.value * (10**9 // _PER_SECOND[scalar.type.unit]), 1000)
    return start + timedelta(microseconds=microseconds), nanoseconds


def _timespec(microseconds: int, nanoseconds: int) -> str:
    return "microseconds" if microseconds or nanoseconds else "seconds"


def _precise(text: str, length: int, nanoseconds: int) -> str:
    """A time's text, with three more digits behind its microseconds, which end at `length`, where they say anything."""
    return f"{text[:length]}{nanoseconds:03}{text[length:]}" if nanoseconds else text


_FORMS: dict[str, Callable[[Any], Any]] = {  # by the class of pyarrow's scalar
    "MapScalar": _map,
    "StructScalar": _struct,
    **dict.fromkeys((f"{kind}Scalar" for kind in ("List", "LargeList", "FixedSizeList")), _list),
    **dict.fromkeys(("ListViewScalar", "LargeListViewScalar"), _list),
    "DictionaryScalar": lambda scalar: _value(scalar.value),
    "TimestampScalar": _timestamp,
    "Time32Scalar": _time_of_day,
    "Time64Scalar": _time_of_day,
    "DurationScalar": _duration,
}
