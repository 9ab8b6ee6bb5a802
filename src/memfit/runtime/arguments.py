"""Refuses what a public function was given, before anything uses it: what it is, and what to give."""

from __future__ import annotations

from numbers import Integral


def check_type(name: str, given: object, kind: type, cure: str) -> None:
    """Refuses an argument that is not of a type.

    Raises:
        TypeError: It is not.
    """
    if not isinstance(given, kind):
        raise TypeError(f"{name} is a {type(given).__name__}: give {cure}")


def check_function(name: str, given: object, signature: str) -> None:
    """Refuses an argument that cannot be called.

    Raises:
        TypeError: It cannot.
    """
    if not callable(given):
        raise TypeError(f"{name} is a {type(given).__name__}: give a function {signature}")


def check_micro_batch_size(given: object, rows: int) -> None:
    """Refuses a pinned micro-batch that a batch of so many rows does not have; None pins nothing.

    Raises:
        TypeError: It is no whole number.
        ValueError: It is below 1 or above ``rows``, or True or False.
    """
    if given is None:
        return
    if not isinstance(given, Integral):
        raise TypeError(
            f"micro_batch_size is {given!r}, a {type(given).__name__}: give a whole number of rows, "
            f"1 to {rows}"
        )
    if isinstance(given, bool) or not 1 <= int(given) <= rows:
        raise ValueError(f"micro_batch_size is {given}, and the batch has {rows} rows: give 1 to {rows}")
