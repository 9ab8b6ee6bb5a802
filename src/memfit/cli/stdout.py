"""Stdout for what a command prints, and nothing else.

HiGHS prints a line on C's stdout that no option silences (``transformNewIntegerFeasibleSolution`` in
``HighsMipSolverData.cpp``; known as jump-dev/HiGHS.jl#312). Amid JSON it would make that unreadable.
"""

from __future__ import annotations

import ctypes
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_OUT, _ERROR = 1, 2  # file descriptors


@contextmanager
def own_stdout() -> Iterator[None]:
    """In the body, what Python prints goes to stdout, and what C code prints goes to stderr.

    Nothing changes where Python's stdout is no longer that of the process, as in a notebook.
    """
    outer = sys.stdout
    if not (isinstance(outer, io.TextIOWrapper) and _descriptor_of(outer) == _OUT and _is_open(_ERROR)):
        yield
        return
    _flush_all(outer)
    ours = os.dup(_OUT)
    os.dup2(_ERROR, _OUT)
    try:
        with open(
            ours,
            "w",
            encoding=outer.encoding,
            errors=outer.errors,
            buffering=1 if outer.line_buffering else -1,
        ) as inner:
            sys.stdout = inner
            try:
                yield
            finally:
                sys.stdout = outer
                _flush_all(outer)
                os.dup2(ours, _OUT)
    finally:
        sys.stdout = outer


def _descriptor_of(stream: io.TextIOWrapper) -> int | None:
    """The file descriptor behind a stream; None if it is closed, or of memory alone."""
    try:
        return stream.fileno()
    except (OSError, ValueError):
        return None


def _is_open(descriptor: int) -> bool:
    """Whether a file descriptor can be written to, for all that is known."""
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def _flush_all(python: io.TextIOWrapper) -> None:
    """Hands over what Python and C hold back, so that it goes where it was printed to."""
    python.flush()
    if os.name == "posix":
        ctypes.CDLL(None).fflush(None)
