"""`memfit doctor`."""

from __future__ import annotations

from dataclasses import asdict

import typer

from memfit.cli.ending import (
    EXIT_BAD_INPUT,
    EXIT_BROKEN_PROMISE,
    interruptible,
    progress,
    say,
    show,
    show_json,
)
from memfit.cli.options import AsJson, Quiet
from memfit.cli.stdout import own_stdout
from memfit.core.machine import Finding
from memfit.report.tables import doctor_tables, doctor_verdict
from memfit.report.terminal import spaced


def doctor(
    *,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Show what this machine offers, and check that memfit keeps its promises on it; some seconds."""
    with interruptible(), own_stdout():
        progress(quiet=quiet).print("looking, measuring, and training a small model", style="dim")
        try:
            from memfit.doctor import CHECK, examine
        except ImportError as error:
            say(
                f"memfit: a package that memfit needs does not import: {error}. Run pip install memfit again."
            )
            raise typer.Exit(EXIT_BAD_INPUT) from error
        found = examine()
    if as_json:
        data = {
            "machine": asdict(found.machine),
            "speeds": [asdict(each) for each in found.speeds],
            "findings": [_as_json(finding) for finding in found.findings],
            "problems": len(found.problems),
        }
        show_json("doctor", data)
    else:
        if not quiet:
            show(*spaced(doctor_tables(found)), "")
        show(doctor_verdict(found))
    if any(problem.subject.startswith(CHECK) for problem in found.problems):
        raise typer.Exit(EXIT_BROKEN_PROMISE)
    if found.problems:
        raise typer.Exit(EXIT_BAD_INPUT)


def _as_json(finding: Finding) -> dict[str, str]:
    """A finding as plain data."""
    return {
        "level": finding.level.value,
        "subject": finding.subject,
        "text": finding.text,
        "cure": finding.cure,
    }
