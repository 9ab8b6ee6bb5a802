"""The command line: reads options, calls the library, shows the outcome, maps errors to exit codes.

Imports no torch before a command that needs it runs. Exit codes:

    0 done   2 usage   3 no plan fits   4 verification failed, or memory ran out
    5 bad input   6 a process of several was lost   130 interrupted

Anything else ends with a traceback and code 1: it is a bug, here or in the model.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

import memfit
from memfit.core.devices import DEVICES
from memfit.core.devices import Device as Card
from memfit.errors import InfeasibleBudget, MemfitError, VerificationFailed
from memfit.report.terminal import (
    TerminalWatcher,
    frontier_table,
    plan_table,
    plan_verdict,
    result_table,
    strategy_notes,
    strategy_table,
)
from memfit.units import parse_memory
from memfit.workload import DEFAULT_TARGET

if TYPE_CHECKING:
    from memfit.core.allocator import Memory as CudaMemory
    from memfit.core.export import Export
    from memfit.core.graph import Profile
    from memfit.core.plan import Plan
    from memfit.train import RunResult
    from memfit.workload import Workload

EXIT_INFEASIBLE = 3
EXIT_BROKEN_PROMISE = 4
EXIT_BAD_INPUT = 5
EXIT_LOST_RANK = 6
EXIT_INTERRUPTED = 130

_DEFAULT_SHARE = "90%"  # of a card: the rest is for CUDA itself and for what its allocator cannot use

app = typer.Typer(
    name="memfit",
    help="Fits a PyTorch training step into a stated amount of memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="Exit codes: 0 done, 2 usage, 3 no plan fits, 4 verification failed or memory ran out, "
    "5 bad input, 6 a process of several was lost, 130 interrupted.",
)

Target = Annotated[
    str,
    typer.Argument(help="package.module:function or file.py:function that returns a memfit.Workload."),
]
Memory = Annotated[
    str | None,
    typer.Option(help="The peak of all tensors on the device, such as 400MiB, 8GiB, or 80% of a GPU."),
]
BatchSize = Annotated[int | None, typer.Option(help="Rows of the effective batch.", min=1)]
MicroBatchSize = Annotated[
    int | None, typer.Option(help="Pins the rows of a micro-batch; otherwise memfit chooses.", min=1)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Seed = Annotated[int, typer.Option(help="Seed of weights, data and dropout.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda, if TARGET takes a device.")]
PlannedDevice = Annotated[
    str | None,
    typer.Option(
        "--device", help=f"What to plan for: {', '.join(DEVICES)}; or cpu or cuda, if TARGET takes a device."
    ),
]


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


@app.command()
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
    with _interruptible():
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
        _show(result.as_json() if as_json else result_table(result))
        _report_of(out, cap_bytes)
    _end(result)


@app.command()
def plan(
    target: Target = DEFAULT_TARGET,
    *,
    memory: Memory = None,
    batch_size: BatchSize = None,
    micro_batch_size: MicroBatchSize = None,
    seed: Seed = 0,
    device: PlannedDevice = None,
    export: Annotated[
        str | None, typer.Option(help="Print it as settings of another tool: transformers or axolotl.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print the plan for TARGET within --memory, or most of a --device; the model takes no memory here."""
    card = _card(device)
    if memory is None and card is None:
        raise typer.BadParameter("say how much, such as --memory 24GiB", param_hint="--memory")
    memory_bytes = parse_memory(
        memory or _DEFAULT_SHARE, total_bytes=None if card is None else card.memory_bytes
    )
    with _interruptible():
        from memfit.api import find_plan
        from memfit.core.advice import advice, block

        recorded, micro_batch_size, work = _recorded(target, batch_size, micro_batch_size, seed, device)
        found = find_plan(recorded, memory=memory_bytes, micro_batch_size=micro_batch_size)
        epoch = work.rows_per_epoch(found.rows)
        lines = advice(recorded, found, rows_per_epoch=epoch, betas=work.betas)
        settings = None if export is None else _exported(recorded, found, export)
    if as_json:
        more = {"advice": lines} | ({} if settings is None else {"export": asdict(settings)})
        print(json.dumps(json.loads(found.to_json()) | more, indent=1))
        return
    if settings is not None:
        print(settings)
        return
    _show(plan_table(found, target, *_cuda_memory(recorded, found)))
    print(plan_verdict(found, target))
    if lines:
        print(block(lines))


@app.command()
def frontier(
    target: Target = DEFAULT_TARGET,
    *,
    batch_size: BatchSize = None,
    micro_batch_size: MicroBatchSize = None,
    plans: Annotated[int, typer.Option(help="How many budgets to plan for.", min=2)] = 12,
    seed: Seed = 0,
    device: PlannedDevice = None,
    as_json: AsJson = False,
) -> None:
    """Print what each amount of memory buys for TARGET, and what checkpointing by hand would cost."""
    with _interruptible():
        from memfit.api import frontier as find_frontier
        from memfit.core.strategies import notable, strategies

        recorded, micro_batch_size, _ = _recorded(target, batch_size, micro_batch_size, seed, device)
        found = find_frontier(recorded, micro_batch_size=micro_batch_size, plans=plans)
        others = strategies(recorded, micro_batch_size=micro_batch_size)
    if as_json:
        data = {"plans": [json.loads(p.to_json()) for p in found], "strategies": [asdict(s) for s in others]}
        print(json.dumps(data))
        return
    _show(frontier_table(found, target))
    _show(strategy_table(notable(others), found))
    print(strategy_notes(others))
    print(f"Seconds by {recorded.source}; recomputed is a share of them. Any of these fits --memory.")


@app.command()
def report(
    run_or_plan: Annotated[Path, typer.Argument(help="The --out of a train, or a plan of plan --json.")],
    *,
    profile: Annotated[
        Path | None, typer.Option(help="The profile of a plan; by default profile.json beside it.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The page; by default RUN/report.html, or PLAN.html beside the plan.")
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Write the timeline as a PNG, too.")] = None,
    svg: Annotated[Path | None, typer.Option(help="Write the timeline as an SVG, too.")] = None,
    snapshot: Annotated[
        Path | None,
        typer.Option(help="Write a memory snapshot for pytorch.org/memory_viz, such as step.pickle."),
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Write a trace for ui.perfetto.dev, such as step.trace.json.")
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="Write the timeline as a table, such as step.csv.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Write the timeline and the plans as JSON, such as step.json.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write one HTML page that shows a run or a plan; it opens from disk without a network."""
    from memfit.report.export import write_exports
    from memfit.report.page import write_picture, write_report

    page, content = write_report(run_or_plan, profile=profile, out=out)
    written = {"page": str(page)}
    asked = {"snapshot": snapshot, "trace": trace, "csv": csv, "data": data}
    exports = {kind: path for kind, path in asked.items() if path is not None}
    write_exports(content, exports)
    written |= {kind: str(path) for kind, path in exports.items()}
    for kind, path in (("png", png), ("svg", svg)):
        if path is not None:
            write_picture(content, path, kind)
            written[kind] = str(path)
    if as_json:
        _show(written)
    else:
        print("\n".join(written.values()))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code.

    Args:
        arguments: What follows the program's name; by default what it was called with.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
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
        _say("Interrupted.")
        return EXIT_INTERRUPTED
    return 0


def _report_of(folder: Path, cap_bytes: int | None) -> None:
    """Writes the page of a run that has ended; a run is not lost because its page cannot be written."""
    from memfit.report.page import write_report

    if cap_bytes is not None:
        from memfit.runtime.meter import lift_hard_cap

        lift_hard_cap()
    try:
        page, _ = write_report(folder)
    except (MemfitError, ValueError, OSError) as error:
        _say(f"The report was not written: {error}")
    else:
        _say(f"Report: {page}")


def _recorded(
    target: str, batch_size: int | None, micro_batch_size: int | None, seed: int, device: str | None
) -> tuple[Profile, int | None, Workload]:
    """The profile of a workload built from fake tensors, the micro-batch to plan it at, and the workload."""
    from memfit.api import profile
    from memfit.runtime.fake import fake_tensors
    from memfit.workload import load_target

    console = Console(stderr=True)
    console.print(f"recording one step of {target} on fake tensors", style="dim")
    card = _card(device)
    with fake_tensors():
        place = device if card is None else None
        workload = load_target(target, batch_size=batch_size, seed=seed, device=place)
        workload.model.train()
        batch = next(workload.batches_from(0))
        recorded = profile(
            workload.model,
            workload.loss_fn,
            batch,
            optimizer=workload.optimizer,
            device=card,
            outputs_fn=workload.outputs_fn,
            batch_norm=workload.batch_norm,
        )
    if micro_batch_size is None and any(graph.coupled for graph in recorded.graphs):
        micro_batch_size = recorded.rows  # a layer looks across the rows: parts would change the gradient
    console.print("planning", style="dim")
    return recorded, micro_batch_size, workload


def _cuda_memory(recorded: Profile, found: Plan) -> list[CudaMemory]:
    """What CUDA's allocator will take for a plan, without and with expandable segments; empty on a CPU."""
    from memfit.core.allocator import MIN_BLOCK_BYTES
    from memfit.core.reserved import predict_cuda_memory

    if recorded.alignment_bytes != MIN_BLOCK_BYTES:
        return []
    return [predict_cuda_memory(recorded, found, expandable_segments=is_on) for is_on in (False, True)]


def _exported(recorded: Profile, found: Plan, tool: str) -> Export:
    """A plan as another tool's settings, compared with what those are predicted to take."""
    from memfit.core.export import equal_part, export
    from memfit.core.strategies import strategies

    return export(found, tool, strategies(recorded, micro_batch_size=equal_part(found)))


def _card(device: str | None) -> Card | None:
    """The card to plan for; None where --device is for TARGET."""
    return DEVICES.get((device or "").strip().lower())


def _end(result: RunResult) -> None:
    """Ends all processes of a run with its exit code; the first one says why."""
    if result.interrupted:
        if result.is_first:
            _say(f"Interrupted after step {result.steps_done}, which is saved: go on with --resume.")
        raise typer.Exit(EXIT_INTERRUPTED)
    if result.held is False:
        if result.is_first:
            _say(
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


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ends with the code of an interruption on Ctrl-C; typer would use its own."""
    try:
        yield
    except KeyboardInterrupt:
        _say("Interrupted. The last checkpoint stays: go on with --resume.")
        raise typer.Exit(EXIT_INTERRUPTED) from None


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Returns whether the run found no memory. The class lives beside torch, which may not be loaded."""
    return type(error).__name__ == "RanOutOfMemory"


def _is_lost_rank(error: RuntimeError) -> bool:
    """Returns whether another process of the run has gone."""
    return type(error).__name__ == "LostRank"


def _show(what: Any) -> None:
    """Prints data on stdout, JSON or a table."""
    if isinstance(what, dict):
        print(json.dumps(what))
    else:
        Console().print(what)


def _say(text: str) -> None:
    """Prints a message for people on stderr."""
    print(text, file=sys.stderr)


def _fail(error: Exception, code: int) -> int:
    """Prints an error in one message and returns its exit code."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror is not None:
        # Without "[Errno 28]": the number says nothing to a reader.
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if not getattr(error, "is_told", False):  # another rank of several says it
        _say(f"memfit: {text}")
    return code
