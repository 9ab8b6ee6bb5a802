"""Writes the reference of the command line into the page that asks for it, from the command line itself.

Where a page has the line ``<!-- commands -->``, all commands follow with all of their options.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer

from memfit.cli.app import app as command_line

MARK = "<!-- commands -->"


def reference() -> str:
    """All commands in Markdown, the program's own options first."""
    return "\n".join(_lines(typer.main.get_command(command_line), "memfit"))


def commands(command: Any = None, name: str = "") -> Iterator[tuple[str, Any]]:
    """Each command that can be run, by what is written after ``memfit``."""
    command = command or typer.main.get_command(command_line)
    inner = getattr(command, "commands", None)
    if inner is None:
        yield name, command
        return
    for own, each in inner.items():
        yield from commands(each, f"{name} {own}".strip())


def options(command: Any) -> list[str]:
    """The options of a command as they are written, without ``--help``."""
    return [name for each in command.params for name in each.opts if name.startswith("-")]


def _lines(program: Any, name: str) -> Iterator[str]:
    yield from _about(program)
    for words, command in commands(program):
        yield from (f"## {name} {words}", "")
        context = command.make_context(f"{name} {words}", [], resilient_parsing=True)
        yield from ("```text", command.get_usage(context).removeprefix("Usage: "), "```", "")
        yield from _about(command)


def _about(command: Any) -> Iterator[str]:
    """What a command says of itself, then its arguments and options as a list of terms."""
    yield from (_prose(command.help or ""), "")
    for each in command.params:
        yield from (f"`{_spelt(each)}`", f": {_prose(each.help or '')}{_default(each)}", "")
    yield from (_prose(command.epilog or ""), "")


def _spelt(parameter: Any) -> str:
    """As it is written on the command line."""
    if parameter.param_type_name == "argument":
        return str(parameter.name.upper())
    kind = "" if parameter.is_flag else f" {parameter.name.removeprefix('as_').upper()}"
    return ", ".join(parameter.opts) + kind


def _default(parameter: Any) -> str:
    if parameter.required:
        return " Required."
    is_told = parameter.default not in (None, False)
    return f" By default `{parameter.default}`." if is_told else ""


def _prose(text: str) -> str:
    """Help as Markdown: ``--option`` must not become a dash, ``<`` no tag."""
    return text.strip().replace("<", "\\<").replace("--", "\\-\\-")


def _fill(app: Any, name: str, source: list[str]) -> None:
    if MARK in source[0]:
        source[0] = source[0].replace(MARK, reference())


def setup(app: Any) -> dict[str, bool]:
    """Tells Sphinx."""
    app.connect("source-read", _fill)
    return {"parallel_read_safe": True}
