"""`memfit train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from memfit.cli.ending import (
    EXIT_BROKEN_PROMISE,
    EXIT_INTERRUPTED,
    interruptible,
    progress,
    say,
    show,
    show_json,
)
from memfit.cli.options import AsJson, BatchSize, Device, Memory, MicroBatchSize, Quiet, Seed, Target
from memfit.cli.stdout import own_stdout
from memfit.errors import MemfitError
from memfit.report.terminal import TerminalWatcher, result_table, result_verdict, run_pictures
from memfit.units import parse_memory
from memfit.workload import DEFAULT_TARGET

if TYPE_CHECKING:
    from rich.console import Console

    from memfit.report.contents import Contents
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
    quiet: Quiet = False,
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
    with interruptible("The last checkpoint stays: go on with --resume."), own_stdout():
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
        with TerminalWatcher(progress(quiet=quiet)) as watcher:
            result = run_training(options, watcher)
    if result.is_first:
        _tell(result, target, cap_bytes, as_json=as_json, quiet=quiet)
    _end(result)


def _tell(result: RunResult, target: str, cap_bytes: int | None, *, as_json: bool, quiet: bool) -> None:
    """Writes the page of a run and shows what it came to."""
    if as_json:
        show_json("train", result.as_json())
    content = _report_of(result.out, cap_bytes, progress(quiet=quiet))
    if not as_json and not quiet:
        pictures = [] if content is None or content.planned is None else run_pictures(content.planned)
        show(result_table(result), *pictures, "")
    if not as_json:
        show(result_verdict(result, target))


def _report_of(folder: Path, cap_bytes: int | None, console: Console) -> Contents | None:
    """Writes the page of a run that has ended; a run is not lost because its page cannot be written."""
    if cap_bytes is not None:
        from memfit.runtime.meter import lift_hard_cap

        lift_hard_cap()  # first: the libraries that draw may not even load under it
    from memfit.report.page import write_report

    try:
        page, content = write_report(folder)
    except (MemfitError, ValueError, OSError) as error:
        say(f"The report was not written: {error}")
        return None
    console.print(f"Report: {page}", soft_wrap=True)
    return content


def _end(result: RunResult) -> None:
    """Ends all processes of a run with its exit code; the first one says why."""
    if result.interrupted:
        if result.is_first:
            when = f"after step {result.steps_done}, which is saved" if result.steps_done else "before step 1"
            say(f"Interrupted {when}: go on with --resume.")
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
