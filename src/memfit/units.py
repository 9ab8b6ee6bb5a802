"""Text to quantities and back: bytes and seconds as people write and read them."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Final

_UNIT_BYTES: Final = {
    "b": 1,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
}
_QUANTITY: Final = re.compile(r"(?P<number>\d+(?:\.\d*)?|\.\d+)\s*(?P<unit>[A-Za-z%]*)", re.ASCII)
_MOST_DIGITS: Final = 40
_BEYOND: Final = 2**63
_CURE: Final = "write an int of bytes, or a number and its unit such as '8GiB', '512MiB' or '8GB'"


def parse_memory(text_or_int: str | int, *, total_bytes: int | None = None) -> int:
    """Returns the number of bytes that ``text_or_int`` states, at least 1.

    ``GiB`` is 2**30 bytes and ``GB`` is 10**9, as the standards say. Upper and lower case mean the
    same, but for a ``b`` after a prefix, which means bits and is refused. A fraction of a byte is dropped:
    a budget is never rounded up.

    Args:
        text_or_int: Bytes as an ``int``, or a number with a unit; ``"80%"`` is a share of ``total_bytes``.
        total_bytes: What a percentage is a share of; without it a percentage is refused.

    Raises:
        TypeError: Neither text nor an integer.
        ValueError: Not a positive amount of memory; the text says what was read and what to write.
    """
    if isinstance(text_or_int, bool) or not isinstance(text_or_int, (str, int)):
        raise TypeError(f"memory is a str or an int of bytes, not {text_or_int!r}: {_CURE}")
    if isinstance(text_or_int, int):
        return _positive(text_or_int, text_or_int)
    match = _QUANTITY.fullmatch(text_or_int.strip())
    if match is None:
        raise ValueError(f"cannot read {text_or_int!r} as an amount of memory: {_CURE}")
    number, unit = match["number"], match["unit"]
    if len(number) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(number)} digits is more memory than any machine has: {_CURE}")
    if unit == "%":
        return _share(text_or_int, Decimal(number), total_bytes)
    return _positive(int(Decimal(number) * _unit_bytes(text_or_int, number, unit)), text_or_int)


def _unit_bytes(text: str, number: str, unit: str) -> int:
    """Returns the bytes in one ``unit``; refuses bits, bare numbers and bare prefixes with the cure."""
    if unit == "":
        raise ValueError(
            f"{text!r} has no unit: write '{number}GiB', '{number}MiB', or '{number}B' for bytes"
        )
    if unit.lower() in ("k", "m", "g", "t"):
        prefix = unit.upper()
        raise ValueError(f"{text!r} can mean two sizes: write '{number}{prefix}iB' or '{number}{prefix}B'")
    if len(unit) > 1 and unit.endswith("b") and unit[:-1] != unit[:-1].lower():
        prefix = unit[0].upper()
        raise ValueError(f"{text!r} is in bits: write '{number}{prefix}iB' or '{number}{prefix}B' for bytes")
    if unit.lower() not in _UNIT_BYTES:
        raise ValueError(f"{text!r} has the unknown unit {unit!r}: {_CURE}")
    return _UNIT_BYTES[unit.lower()]


def _share(text: str, percent: Decimal, total_bytes: int | None) -> int:
    """Returns ``percent`` of ``total_bytes``, rounded down."""
    if total_bytes is None:
        raise ValueError(f"{text!r} is a share of an unknown total: {_CURE}")
    if percent > 100:
        raise ValueError(
            f"{text!r} is more than all of the {format_bytes(total_bytes)}: write at most '100%'"
        )
    return _positive(int(total_bytes * percent / 100), text)


def _positive(amount_bytes: int, read: str | int) -> int:
    if amount_bytes < 1:
        raise ValueError(f"memory must be at least one byte, and {read!r} is not: {_CURE}")
    if amount_bytes >= _BEYOND:
        raise ValueError(f"no machine has 8 EiB (2**63 B) of memory, or more: {_CURE}")
    return amount_bytes


def format_bytes(n: int) -> str:
    """Returns ``n`` bytes for people: ``'7.43 GiB'``, ``'512.0 MiB'``, ``'1.5 KiB'``, ``'12 B'``."""
    size = abs(n)
    # Each limit is where the smaller unit would print as 1024.0.
    if size >= 2**30 - 2**20 // 20:
        return f"{n / 2**30:.2f} GiB"
    if size >= 2**20 - 2**10 // 20:
        return f"{n / 2**20:.1f} MiB"
    if size >= 2**10:
        return f"{n / 2**10:.1f} KiB"
    return f"{n} B"


def format_seconds(s: float) -> str:
    """Returns ``s`` seconds for people: ``'2h 05min'``, ``'1min 07s'``, ``'1.25 s'``, ``'83.1 ms'``."""
    size = abs(s)
    if not size < float("inf"):
        return f"{s} s"
    if size >= 3599.5:
        minutes = round(size / 60)
        return f"{'-' if s < 0 else ''}{minutes // 60}h {minutes % 60:02d}min"
    if size >= 59.95:
        seconds = round(size)
        return f"{'-' if s < 0 else ''}{seconds // 60}min {seconds % 60:02d}s"
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if size * scale >= 0.9995:
            return f"{_three_digits(s * scale)} {unit}"
    return f"{_three_digits(s * 1e9)} ns" if s else "0 s"


def _three_digits(value: float) -> str:
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f}"
