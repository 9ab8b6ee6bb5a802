"""Reads stored JSON into frozen dataclasses by their annotations: the one boundary that trusts no file.

Note [What a file may hold]
 1. A field is what its annotation says, and nothing else: ``int`` (no bool, below 2**63), ``float`` (finite),
    ``str`` (without lone surrogates and control characters), ``bool``, ``X | None``, ``tuple[X, ...]``,
    ``tuple[X, Y]``, an ``Enum`` by its name, or another dataclass or NamedTuple.
 2. A record is an object by names or an array by positions; one of a single field may stand for itself. What
    is missing has its default, or is an error. What is too much is an error.
 3. Nesting that Python cannot follow, numbers of thousands of digits, invalid UTF-8 and NaN are errors.
 4. Every failure is a ``ValueError`` that names the place. Cost: linear in the file, whatever it claims.
 5. A *seal* is a digest over the content. It shows damage and a careless hand; who forges it on purpose may
    as well change the program.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

Reader = Callable[[Any], Any]
T = TypeVar("T")
SEAL = "seal"
FloatOrNan = Annotated[float, "null where it is not a number"]
_BEYOND = 1 << 63
_MISSING = dataclasses.MISSING
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def decode(text: str, noun: str) -> dict[str, Any]:
    """Parses a JSON object.

    Raises:
        ValueError: It is none, or cannot be followed.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"this is not {noun}: {short(error)}") from None
    if not isinstance(data, dict):
        raise ValueError(f"this is not {noun}: it is no JSON object")
    return data


def of_format(data: Mapping[str, Any], version: int, noun: str) -> dict[str, Any]:
    """The fields of a file, without what the file says of itself.

    Raises:
        ValueError: It is of another format.
    """
    found = data.get("format")
    if type(found) is not int or found != version:
        raise ValueError(f"this is not {noun} of format {version}; make it again")
    return {name: value for name, value in data.items() if name not in ("format", SEAL)}


def read(kind: type[T], data: object, noun: str, check: Callable[[T], None] = lambda found: None) -> T:
    """Makes a dataclass of parsed JSON. See Note [What a file may hold].

    Raises:
        ValueError: Something is not as the annotations say, or the class or ``check`` refuses it.
    """
    annotation: Any = kind
    try:
        found: T = _reader(annotation)(data)
        check(found)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"this is not {noun}: {short(error)}") from None
    return found


def sealed(data: Mapping[str, Any]) -> str:
    """A JSON object as text, with its seal."""
    return json.dumps({**data, SEAL: seal(data)})


def seal(data: Mapping[str, Any]) -> str:
    """A digest of a JSON object, its seal apart."""
    rest = {name: value for name, value in data.items() if name != SEAL}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def is_intact(data: Mapping[str, Any], noun: str) -> bool:
    """Whether an object carries its seal; ``False`` without any, as older versions wrote it.

    Raises:
        ValueError: The seal is another one: the file was changed after it was written.
    """
    if SEAL not in data:
        return False
    if data[SEAL] != seal(data):
        raise ValueError(f"this is not {noun} as it was written: its seal differs; make it again")
    return True


def short(error: BaseException) -> str:
    """An error in a line, however much of the file it quotes."""
    text = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
    return text if len(text) <= 300 else f"{text[:300]}..."


@cache
def _reader(kind: Any) -> Reader:
    """What reads values of an annotation."""
    plain: dict[Any, Reader] = {int: _whole, float: _finite, str: _text, bool: _truth, NoneType: _nothing}
    if kind in plain:
        return plain[kind]
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _any_float
    if origin is UnionType and NoneType in arguments:
        (inner,) = (_reader(one) for one in arguments if one is not NoneType)
        return lambda data: None if data is None else inner(data)
    if origin is tuple and arguments[1:] == (...,):
        return _many(arguments[0])
    if origin is tuple:
        return _row(tuple, [_Part(str(at), one, _MISSING) for at, one in enumerate(arguments)])
    if isinstance(kind, type) and issubclass(kind, Enum):
        return lambda data: _named(kind, data)
    return _row(_made_by(kind), _parts(kind))


@dataclasses.dataclass(frozen=True, slots=True)
class _Part:
    """A field of a record, and what stands for it where it is missing."""

    name: str
    kind: Any
    default: Any


def _parts(kind: Any) -> list[_Part]:
    """The fields of a dataclass or a NamedTuple."""
    hints = get_type_hints(kind, include_extras=True)
    if dataclasses.is_dataclass(kind):
        return [_Part(f.name, hints[f.name], f.default) for f in dataclasses.fields(kind)]
    defaults = kind._field_defaults
    return [_Part(name, hints[name], defaults.get(name, _MISSING)) for name in kind._fields]


def _made_by(kind: Any) -> Callable[[list[Any]], Any]:
    return lambda values: kind(*values)


def _row(make: Callable[[list[Any]], Any], parts: Sequence[_Part]) -> Reader:
    """Reads a record. See Note [What a file may hold] 2."""
    names = {part.name: at for at, part in enumerate(parts)}

    @cache
    def readers() -> list[Reader]:  # not before they are needed: an audit has audits in it
        return [_reader(part.kind) for part in parts]

    def by_position(data: object) -> list[Any]:
        if isinstance(data, dict):
            strange = next((name for name in data if name not in names), None)
            if strange is not None:
                raise ValueError(f"{strange!r} is not known")
            return [data.get(part.name, _MISSING) for part in parts]
        values = list(data) if isinstance(data, (list, tuple)) else [data] if len(parts) == 1 else None
        if values is None or len(values) > len(parts):
            raise ValueError(f"{told(data)} is no record of {', '.join(names)}")
        return values + [_MISSING] * (len(parts) - len(values))

    def read_row(data: object) -> Any:
        found = []
        for part, reader, value in zip(parts, readers(), by_position(data), strict=True):
            if value is _MISSING:
                if part.default is _MISSING:
                    raise ValueError(f"{part.name} is missing")
                found.append(part.default)
                continue
            try:
                found.append(reader(value))
            except ValueError as error:
                raise ValueError(f"{part.name}: {short(error)}") from None
        return make(found)

    return read_row


def _many(kind: Any) -> Reader:
    """Reads a tuple of any length."""

    def read_many(data: object) -> tuple[Any, ...]:
        reader = _reader(kind)
        if not isinstance(data, (list, tuple)):
            raise ValueError(f"{told(data)} is no list")
        found: list[Any] = []
        try:
            found.extend(map(reader, data))
        except ValueError as error:
            raise ValueError(f"[{len(found)}]: {short(error)}") from None
        return tuple(found)

    return read_many


def _whole(data: object) -> int:
    if type(data) is not int or not -_BEYOND < data < _BEYOND:
        raise ValueError(f"{told(data)} is no whole number below 2**63")
    return data


def _finite(data: object) -> float:
    if type(data) is int:
        return float(_whole(data))
    if type(data) is not float or not math.isfinite(data):
        raise ValueError(f"{told(data)} is no finite number")
    return data


def _any_float(data: object) -> float:
    return data if isinstance(data, float) else math.nan if data is None else _finite(data)


def _text(data: object) -> str:
    if not isinstance(data, str):
        raise ValueError(f"{told(data)} is no text")
    data.encode()  # a lone surrogate is a ValueError, too
    if _CONTROL.search(data):
        raise ValueError(f"{told(data)} has characters that steer a terminal")
    return data


def _truth(data: object) -> bool:
    if not isinstance(data, bool):
        raise ValueError(f"{told(data)} is neither true nor false")
    return data


def _nothing(data: object) -> None:
    if data is not None:
        raise ValueError(f"{told(data)} is not null")


def _named(kind: type[Enum], data: object) -> Enum:
    if not isinstance(data, str) or data not in kind.__members__:
        raise ValueError(f"{told(data)} is none of {', '.join(kind.__members__)}")
    return kind[data]


def told(data: object) -> str:
    """A value of a file in a few words; a number may have thousands of digits."""
    if isinstance(data, int) and not isinstance(data, bool) and abs(data) >= _BEYOND:
        return "a number that large"
    if isinstance(data, (list, dict)):
        return "a list" if isinstance(data, list) else "an object"
    text = repr(data)
    return text if len(text) <= 80 else f"{text[:80]}..."
