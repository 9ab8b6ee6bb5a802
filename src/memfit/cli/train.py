"""`memfit train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from memfit.cli.ending import EXIT_BROKEN_PROMISE, EXIT_INTERRUPTED, interruptible, say, show
from memfit.cli.options import AsJson, BatchSize, Device, Memory, MicroBatchSize, Seed, Target
from memfit.errors import MemfitError
from memfit.report.terminal import TerminalWatcher, result_table
from memfit.units import parse_memory
from memfit.workload import DEFAULT_TARGET

if TYPE_CHECKING:
    from memfit.train import RunResult


def train(
    context: typer.Context,
    target: Target = DEFAULT_TARGET,
    *,
    out: Annotated[Path, typer.Option(help="Folder of the run: plan, losses, checkpoints.")],
    memory: Memory = None,
    batch_size: BatchSize = None,
    steps: Annotated[int, typer.Option(help="Steps in all.", min=1)] = 60,
    seed: Seed = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    micro_batch_size: MicroBatchSize = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="The ordinary step, the whole batch at once, to compare with.")
    ] = False,
    hard_cap: Annotated[
        str | None,
        typer.Option(help="Let this process grow by at most this much once torch is loaded (Linux)."),
    ] = None,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.", min=1)] = 10,
    device: Device = None,
    nproc: Annotated[
        int, typer.Option(help="Processes that share each batch (DistributedDataParallel).", min=1)
    ] = 1,
    as_json: AsJson = False,
) -> None:
    """Train TARGET within --memory; can be killed at any moment and resumed bit for bit."""
    # Read before torch is imported: a typing error is answered at once.
    cap_bytes = None if hard_cap is None else parse_memory(hard_cap)
    _check_memory(memory)
    if memory is None and not plain and device is None:
        raise typer.BadParameter(
            "say how much, such as --memory 400MiB (or run --plain)", param_hint="--memory"
        )
    if nproc > 1:
        raise typer.Exit(_launched(nproc, context.obj))
    with interruptible():
        from memfit.train import TrainOptions
        from memfit.train import train as run_training

        options = TrainOptions(
            target=target,
            memory=memory,
            steps=steps,
            out=out,
            batch_size=batch_size,
            seed=seed,
            resume=resume,
            micro_batch_size=micro_batch_size,
            plain=plain,
            hard_cap_bytes=cap_bytes,
            save_every=save_every,
            device=device,
        )
        with TerminalWatcher(Console(stderr=True)) as watcher:
            result = run_training(options, watcher)
    if result.is_first:
        show(result.as_json() if as_json else result_table(result))
        _report_of(out, cap_bytes)
    _end(result)


def _report_of(folder: Path, cap_bytes: int | None) -> None:
    """Writes the page of a run that has ended; a run is not lost because its page cannot be written."""
    from memfit.report.page import write_report

    if cap_bytes is not None:
        from memfit.runtime.meter import lift_hard_cap

        lift_hard_cap()
    try:
        page, _ = write_report(folder)
    except (MemfitError, ValueError, OSError) as error:
        say(f"The report was not written: {error}")
    else:
        say(f"Report: {page}")


def _end(result: RunResult) -> None:
    """Ends all processes of a run with its exit code; the first one says why."""
    if result.interrupted:
        if result.is_first:
            say(f"Interrupted after step {result.steps_done}, which is saved: go on with --resume.")
        raise typer.Exit(EXIT_INTERRUPTED)
    if result.held is False:
        if result.is_first:
            say(
                "The measured peak is above what was promised; the losses are right. Please report the model."
            )
        raise typer.Exit(EXIT_BROKEN_PROMISE)


def _launched(processes: int, arguments: list[str]) -> int:
    """Runs the same in several processes, without the option that says how many."""
    from memfit.runtime.group import launch

    rest = list(arguments)
    while (at := next((i for i, said in enumerate(rest) if said.startswith("--nproc")), None)) is not None:
        del rest[at : at + (1 if "=" in rest[at] else 2)]
    return launch(processes, rest)


def _check_memory(memory: str | None) -> None:
    """Refuses an amount of memory that cannot be read; what a percentage is of is found out later."""
    if memory is not None:
        parse_memory(memory, total_bytes=2**40)
