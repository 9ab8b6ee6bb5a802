"""How a command ends and speaks: exit codes, data on stdout, messages for people on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console

EXIT_INFEASIBLE = 3
EXIT_BROKEN_PROMISE = 4
EXIT_BAD_INPUT = 5
EXIT_LOST_RANK = 6
EXIT_INTERRUPTED = 130


@contextmanager
def interruptible() -> Iterator[None]:
    """Ends with the code of an interruption on Ctrl-C; typer would use its own."""
    try:
        yield
    except KeyboardInterrupt:
        say("Interrupted. The last checkpoint stays: go on with --resume.")
        raise typer.Exit(EXIT_INTERRUPTED) from None


def show(what: Any) -> None:
    """Prints data on stdout, JSON or a table."""
    if isinstance(what, dict):
        print(json.dumps(what))
    else:
        Console().print(what)


def say(text: str) -> None:
    """Prints a message for people on stderr."""
    print(text, file=sys.stderr)
