"""Random tables for the tests of readers and exports: texts of all characters that files of text stumble over."""

import datetime
import decimal
import random

# Quotes, delimiters, line ends of all kinds, what spreadsheets and pandas take for something else.
PIECES = [
    '"', '""', "'", ",", ";", "\t", "\n", "\r", "\r\n", "\\", "\\n", " ", "\u2028", "\x85", "\x0b", "\x1f", "\ufeff",
    "a", "Z", "ß", "東京", "🎉", "é", "0", "1.5", "NA", "null", "None", "true", "b'x'", "=1+1", "#", "[1]", "{}",
]  # fmt: skip


def text(choose: random.Random, longest: int = 6, without: str = "") -> str:
    """A random text, now and then empty, without the characters of `without`."""
    pieces = choose.choices(PIECES, k=choose.randint(0, longest))
    return "".join(letter for letter in "".join(pieces) if letter not in without)


def names(choose: random.Random, most: int = 4) -> list[str]:
    """Names of columns of a user's own: different ones, and none that Noria or another program gives a meaning."""
    found = {"own " + text(choose, 3) for _ in range(choose.randint(0, most))}
    return sorted(found)


def texts(choose: random.Random, most_rows: int = 6, **kind) -> tuple[list[str], list[list[str]]]:
    """A table of texts: its header, which has `prompt` among columns of a user's own, and its rows."""
    header = names(choose)
    header.insert(choose.randint(0, len(header)), "prompt")
    return header, [[text(choose, **kind) for _ in header] for _ in range(choose.randint(0, most_rows))]


# Arrow's types and values.

UNITS = ("s", "ms", "us", "ns")
_DAY = 86_400
_RANGE = {"s": 10**11, "ms": 10**14, "us": 10**17, "ns": 2**63 - 1}  # within the years that Python and pandas know


def arrow_type(choose: random.Random, depth: int = 2):
    """A random type of Arrow that parquet holds."""
    import pyarrow as pa

    def number(of):
        return lambda: choose.choice(of)()

    inner = lambda: arrow_type(choose, depth - 1)  # noqa: E731
    leaves = [
        number([pa.string, pa.large_string, pa.binary, pa.large_binary]),
        number([pa.int8, pa.int64, pa.uint8, pa.uint64, pa.float16, pa.float32, pa.float64, pa.bool_]),
        number([pa.date32, pa.date64]),
        lambda: pa.timestamp(choose.choice(UNITS[1:]), choose.choice([None, "UTC", "Europe/Berlin", "+05:30"])),
        lambda: choose.choice([pa.time32("ms"), pa.time64("us"), pa.time64("ns")]),
        lambda: pa.duration(choose.choice(UNITS)),
        lambda: choose.choice([pa.decimal128(9, 3), pa.decimal256(50, 2)]),
        lambda: pa.dictionary(pa.int32(), pa.string()),
    ]
    nested = [
        lambda: choose.choice([pa.list_, pa.large_list])(inner()),
        lambda: pa.list_(inner(), 2),
        lambda: pa.struct([(f"k{number}", inner()) for number in range(choose.randint(1, 3))]),
        lambda: pa.map_(choose.choice([pa.string(), pa.int32()]), inner()),
    ]
    return choose.choice(leaves + nested * (depth > 0))()


def arrow_value(choose: random.Random, type, nulls: bool = True):
    """A random value of the type as pyarrow takes it, now and then None."""
    from pyarrow import types

    if nulls and choose.random() < 0.2:
        return None
    if types.is_dictionary(type):
        return text(choose)
    if types.is_map(type):
        keys = {text(choose) if types.is_string(type.key_type) else choose.randint(-9, 9) for _ in range(3)}
        return [(key, arrow_value(choose, type.item_type)) for key in sorted(keys)]
    if types.is_struct(type):
        return {field.name: arrow_value(choose, field.type) for field in type}
    if types.is_fixed_size_list(type):
        return [arrow_value(choose, type.value_type) for _ in range(type.list_size)]
    if types.is_list(type) or types.is_large_list(type):
        return [arrow_value(choose, type.value_type) for _ in range(choose.randint(0, 3))]
    return _arrow_leaf(choose, type)


def _arrow_leaf(choose: random.Random, type):
    from pyarrow import types

    if types.is_string(type) or types.is_large_string(type):
        return text(choose)
    if types.is_binary(type) or types.is_large_binary(type):
        return choose.choice(
            [text(choose).encode(), text(choose).encode(), b"\x89PNG", text(choose).encode() + b"\xe6"]
        )
    if types.is_boolean(type):
        return choose.random() < 0.5
    if types.is_floating(type):
        return choose.choice([0.0, -0.0, 0.5, -1.5, 2.0**14, float("inf")])
    if types.is_integer(type):
        low = 0 if str(type).startswith("u") else -(2 ** (type.bit_width - 1))
        return choose.choice([0, 1, low, low + 2**type.bit_width - 1])
    if types.is_decimal(type):
        return decimal.Decimal(choose.randint(-(10**6), 10**6)).scaleb(-2)
    if types.is_date(type):
        return datetime.date(choose.randint(1, 9998), choose.randint(1, 12), choose.randint(1, 28))
    per_second = 10 ** (3 * UNITS.index(type.unit))
    if types.is_time(type):
        return choose.choice([0, choose.randrange(_DAY * per_second), choose.randrange(_DAY) * per_second])
    most = 3 * 10**9 * per_second if types.is_duration(type) else _RANGE[type.unit] // 4
    return choose.choice([0, 1, -1, choose.randint(-most, most), choose.randint(-(10**9), 10**9) * per_second % most])


# What a row of an output holds.


def json_value(choose: random.Random, depth: int = 2):
    """A random value of a user's own column, as JSON has it."""
    numbers = [0, -1, 7, 2**53, 2**53 + 1, -(2**63), 2**63 - 1, 2**64, 10**30, 0.1, -0.0, 1e300, 1e-300, 2.0, 1e16]
    kinds = [
        lambda: None,
        lambda: choose.random() < 0.5,
        lambda: choose.choice(numbers),
        lambda: text(choose) + choose.choice(["", "", "\0"]),
    ]
    nested = [
        lambda: [json_value(choose, depth - 1) for _ in range(choose.randint(0, 3))],
        lambda: {text(choose): json_value(choose, depth - 1) for _ in range(choose.randint(0, 3))},
    ]
    return choose.choice(kinds + nested * (depth > 0))()


def column_of(choose: random.Random, num_rows: int) -> list:
    """The values of a column: all of one kind, or of any kind."""
    integers, floats = [0, 5, 2**53 + 1, -(2**63)], [0.5, 1e300, -0.0, float("inf"), 3.0]
    one = choose.choice(
        [
            lambda: choose.choice([None, text(choose)]),
            lambda: choose.choice([None, *integers]),
            lambda: choose.choice([None, *floats]),
            lambda: choose.choice([None, True, False]),
            lambda: choose.choice([*floats, 1, 2**53, -7]),
            lambda: choose.choice([*floats, *integers]),
            lambda: json_value(choose),
        ]
    )
    return [one() for _ in range(num_rows)]
