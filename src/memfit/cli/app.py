"""The command line: reads options, calls the library, shows the outcome, maps errors to exit codes.

Imports no torch before a command that needs it runs. Exit codes:

    0 done   2 usage   3 no plan fits   4 verification failed, or memory ran out
    5 bad input   6 a process of several was lost   7 accumulation is not exact (audit)   130 interrupted

Anything else ends with a traceback and code 1: it is a bug, here or in the model.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence
from typing import Annotated

import typer

import memfit
from memfit.cli.audit import audit
from memfit.cli.compare import compare
from memfit.cli.doctor import doctor
from memfit.cli.ending import (
    EXIT_BAD_INPUT,
    EXIT_BROKEN_PROMISE,
    EXIT_INFEASIBLE,
    EXIT_INTERRUPTED,
    EXIT_LOST_RANK,
    say,
)
from memfit.cli.frontier import frontier
from memfit.cli.plan import plan
from memfit.cli.profile import profile
from memfit.cli.report import report
from memfit.cli.train import train
from memfit.errors import InfeasibleBudget, MemfitError, VerificationFailed

app = typer.Typer(
    name="memfit",
    help="Fits a PyTorch training step into a stated amount of memory.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="Exit codes: 0 done, 2 usage, 3 no plan fits, 4 verification failed or memory ran out, "
    "5 bad input, 6 a process of several was lost, 7 accumulation is not exact (audit), 130 interrupted.",
)

_EXAMPLES: dict[Callable[..., None], str] = {
    train: "memfit train job.py:workload --memory 8GiB --steps 1000 --out runs/first",
    plan: "memfit plan job.py:workload --device h100 --batch-size 64",
    frontier: "memfit frontier job.py:workload --batch-size 64",
    profile: "memfit profile job.py:workload --out job.profile.json",
    audit: "memfit audit job.py:workload && echo exact",
    report: "memfit report runs/first --png timeline.png",
    compare: "memfit compare job.py:workload --memory 8GiB --steps 10",
    doctor: "memfit doctor --json > machine.json",
}

for command, example in _EXAMPLES.items():
    app.command(epilog=f"Example: {example}")(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"memfit {memfit.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Fits a PyTorch training step into a stated amount of memory."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code.

    Args:
        arguments: What follows the program's name; by default what it was called with.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    _print_what_cannot_be_encoded()
    try:
        app(args=given, prog_name="memfit", obj=given)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    except InfeasibleBudget as error:
        return _fail(error, EXIT_INFEASIBLE)
    except VerificationFailed as error:
        return _fail(error, EXIT_BROKEN_PROMISE)
    except (MemfitError, ValueError, TypeError, OSError) as error:
        return _fail(error, EXIT_BAD_INPUT)
    except RuntimeError as error:
        if _is_lost_rank(error):
            return _fail(error, EXIT_LOST_RANK)
        if not _is_out_of_memory(error):
            raise
        return _fail(error, EXIT_BROKEN_PROMISE)
    except KeyboardInterrupt:
        say("Interrupted.")
        return EXIT_INTERRUPTED
    return 0


def _print_what_cannot_be_encoded() -> None:
    """Lets stdout spell out what its encoding lacks, as stderr does: a name must not end a command."""
    if isinstance(sys.stdout, io.TextIOWrapper) and not sys.stdout.encoding.lower().startswith("utf"):
        sys.stdout.reconfigure(errors="backslashreplace")


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Returns whether the run found no memory. The class lives beside torch, which may not be loaded."""
    return type(error).__name__ == "RanOutOfMemory"


def _is_lost_rank(error: RuntimeError) -> bool:
    """Returns whether another process of the run has gone."""
    return type(error).__name__ == "LostRank"


def _fail(error: Exception, code: int) -> int:
    """Prints an error in one message and returns its exit code."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror is not None:
        # Without "[Errno 28]": the number says nothing to a reader.
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if not getattr(error, "is_told", False):  # another rank of several says it
        say(f"memfit: {text}")
    return code
