"""How a command ends and speaks: exit codes, data on stdout, messages for people on stderr.

Note [JSON]
 1. ``--json`` prints one object on stdout. It begins with ``schema``, which says what kind of object it is
    ("memfit/plan"), and ``schema_version``. Keys may be added within a version; a key that goes or
    changes its meaning makes a new version, of that kind alone.
 2. A plan and a profile carry ``format``, too: that is what ``Plan.from_json`` checks. So the output of
    ``memfit plan --json`` is a plan, with more.
 3. JSON has no infinity and no "not a number": both are null.

Note [Quiet]
 1. With ``--quiet`` nothing but errors goes to stderr, and stdout has one line: the verdict, or with
    ``--json`` the object. Data that an option of its own asks for (``plan --export``) is still printed.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console, RenderableType

EXIT_INFEASIBLE = 3
EXIT_BROKEN_PROMISE = 4
EXIT_BAD_INPUT = 5
EXIT_LOST_RANK = 6
EXIT_INEXACT = 7
EXIT_INTERRUPTED = 130

SCHEMA_VERSION = 1
PIPED_WIDTH = 100  # of what is no terminal, whatever the window it was started in


@contextmanager
def interruptible(left: str = "") -> Iterator[None]:
    """Ends with the code of an interruption on Ctrl-C; typer would use its own.

    Args:
        left: What the command leaves behind, for people.
    """
    try:
        yield
    except KeyboardInterrupt:
        say(f"Interrupted. {left}".rstrip())
        raise typer.Exit(EXIT_INTERRUPTED) from None


def show(*what: RenderableType) -> None:
    """Prints text, tables and pictures on stdout."""
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = PIPED_WIDTH
    for each in what:
        console.print(each, soft_wrap=isinstance(each, str) and not console.is_terminal)


def show_json(kind: str, data: Mapping[str, Any]) -> None:
    """Prints one JSON object on stdout, with its schema. See Note [JSON].

    Args:
        kind: What the object is, such as "plan"; its schema is "memfit/plan".
    """
    told = {"schema": f"memfit/{kind}", "schema_version": SCHEMA_VERSION, **_finite(data)}
    print(json.dumps(told, indent=1, allow_nan=False))


def progress(*, quiet: bool = False) -> Console:
    """Where to print what goes on meanwhile: stderr, or nowhere with ``--quiet``."""
    console = Console(stderr=True, highlight=False, markup=False, emoji=False, quiet=quiet)
    if not console.is_terminal:
        console.width = PIPED_WIDTH
    return console


def say(text: str) -> None:
    """Prints an error, or what else must be said, on stderr; ``--quiet`` does not silence it."""
    print(text, file=sys.stderr)


def _finite(value: Any) -> Any:
    """The same data with null for what is no finite number."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(name): _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value
