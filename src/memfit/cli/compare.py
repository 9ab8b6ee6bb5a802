"""`memfit compare`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from memfit.cli.ending import (
    EXIT_BAD_INPUT,
    EXIT_BROKEN_PROMISE,
    EXIT_INFEASIBLE,
    interruptible,
    progress,
    show,
    show_json,
)
from memfit.cli.options import AsJson, BatchSize, Device, Quiet, Seed, Target
from memfit.cli.stdout import own_stdout
from memfit.report.tables import compare_notes, compare_table, compare_verdict
from memfit.units import parse_memory
from memfit.workload import DEFAULT_TARGET

if TYPE_CHECKING:
    from memfit.compare import Outcome


def compare(
    target: Target = DEFAULT_TARGET,
    *,
    memory: Annotated[
        str, typer.Option(help="What memfit may take, such as 400MiB, 8GiB, or 80% of the device.")
    ],
    steps: Annotated[int, typer.Option(help="Steps that are timed, after 3 that warm up.", min=1)] = 5,
    batch_size: BatchSize = None,
    seed: Seed = 0,
    device: Device = None,
    hard_cap: Annotated[
        str | None,
        typer.Option(help="Let each process grow by at most this much once torch is loaded (Linux, CPU)."),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Run TARGET plain, with every block checkpointed, and with memfit; show time and peak of each."""
    parse_memory(memory, total_bytes=2**40)  # read before torch is imported
    cap_bytes = None if hard_cap is None else parse_memory(hard_cap)
    with interruptible(), own_stdout():
        from memfit.compare import Request, Way
        from memfit.compare import compare as run_all

        request = Request(target, memory, steps, batch_size, seed, device, cap_bytes)
        console = progress(quiet=quiet)
        found = run_all(request, lambda text: console.print(text, style="dim"))
    if as_json:
        show_json("compare", {"target": target, "steps": steps} | found.as_json())
    else:
        if not quiet:
            show(compare_table(found, target), *compare_notes(found))
        show(compare_verdict(found, target))
    _end(found.of(Way.MEMFIT))


def _end(fitted: Outcome) -> None:
    """Ends with the exit code of what memfit came to; how the others ended is the result, and no error."""
    from memfit.compare import End

    codes = {
        End.NO_PLAN: EXIT_INFEASIBLE,
        End.OUT_OF_MEMORY: EXIT_BROKEN_PROMISE,
        End.NOT_POSSIBLE: EXIT_BAD_INPUT,
        End.FAILED: 1,
        End.DONE: 0 if fitted.is_within else EXIT_BROKEN_PROMISE,
    }
    if codes[fitted.end]:
        raise typer.Exit(codes[fitted.end])
