"""The training run behind ``memfit train``: one folder, resumable at any moment, bit for bit.

Says what happens to a ``Watcher`` and never prints.

Note [Processes]
 1. Started by torchrun, or with ``--nproc``, each process builds the same workload from the same seed, takes
    its share of every batch, and trains the model in DistributedDataParallel. The batch size is that of all.
 2. Rank 0 writes the folder and speaks. Every other reads it.
 3. The random numbers of training are those of one process on rank 0. On the others they start anew with each
    step, from the seed, the rank and the step: a checkpoint need not know them.
 4. ``--resume`` starts where nothing is there to go on with: torchrun restarts a run as it was started.
"""

from __future__ import annotations

import logging
import platform
import random
import re
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy as np
import torch

import memfit
from memfit.api import Step, fit
from memfit.core.advice import advice, block
from memfit.core.plan import Plan
from memfit.runtime.folder import (
    LossLog,
    check_resumable,
    cut_losses,
    read_plan,
    read_profile,
    start_run,
    write_plan,
    write_run,
)
from memfit.runtime.group import own_rows, process_group
from memfit.runtime.meter import PeakMeter, resident_bytes, set_hard_cap
from memfit.runtime.micro import weighted_loss, whole_loss
from memfit.runtime.ranks import Ranks
from memfit.runtime.rescue import is_out_of_memory
from memfit.runtime.state import (
    Position,
    RandomState,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from memfit.units import format_bytes
from memfit.workload import Workload, load_target

_WARM_STEPS = 3  # steps of a process that say nothing about speed: verified, metered, caches cold


class RanOutOfMemory(RuntimeError):
    """The machine, the device or the hard cap had no more memory for the step."""


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """What ``memfit train`` was asked for.

    Attributes:
        memory: The budget; ``None`` for what is free on a CUDA device.
        batch_size: Rows of the effective batch; ``None`` for the workload's default.
        steps: Steps in all, those before a resume included.
        hard_cap_bytes: Bytes that may be added to this process after torch is loaded; ``None`` for no cap.
        save_every: Steps between checkpoints.
        plain: Run the ordinary step on the whole batch, without memfit.
    """

    target: str
    memory: str | None
    steps: int
    out: Path
    batch_size: int | None = None
    seed: int = 0
    resume: bool = False
    micro_batch_size: int | None = None
    plain: bool = False
    hard_cap_bytes: int | None = None
    save_every: int = 10
    device: str | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "save_every", "batch_size", "micro_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, and {value} is not.")
        if self.plain and (self.memory is not None or self.micro_batch_size is not None):
            raise ValueError(
                "A plain run takes the whole batch at once and has no plan: leave out --memory and "
                "--micro-batch-size, or leave out --plain."
            )

    def as_json(self) -> dict[str, Any]:
        """Returns the options as JSON data."""
        return {name: value for name, value in asdict(self).items() if name not in ("out", "resume")}


@dataclass(frozen=True, slots=True)
class StepReport:
    """One step done: its number from 1, its loss, and what it took.

    Attributes:
        measured_peak_bytes: The highest that the metered steps so far have measured under this plan, if any.
    """

    step: int
    steps: int
    loss: float
    seconds: float
    amount: int
    unit: str
    measured_peak_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run came to.

    Attributes:
        measured_peak_bytes: The allocator's account of the metered steps; ``None`` if none was metered.
        median_step_s: Median over the steps of this process that were not metered; ``None`` without any.
        is_first: Whether this is the process that speaks, of several.
        held: Whether the measured peak is within prediction and budget, and CUDA's allocator never had to
            make room for it; ``None`` in a plain run.
    """

    steps_done: int
    first_loss: float
    last_loss: float
    measured_peak_bytes: int | None
    median_step_s: float | None
    plan: Plan | None
    held: bool | None
    interrupted: bool
    out: Path
    advice: tuple[str, ...] = ()
    is_first: bool = True

    def as_json(self) -> dict[str, Any]:
        """Returns the result as JSON data, the plan by its main figures."""
        plan = self.plan
        figures = {} if plan is None else _plan_figures(plan)
        own = ("steps_done", "first_loss", "last_loss", "measured_peak_bytes", "median_step_s", "held")
        said = {"interrupted": self.interrupted, "advice": list(self.advice)}
        return {**{name: getattr(self, name) for name in own}, **said, **figures}


class Watcher(Protocol):
    """Whoever shows a run while it goes on."""

    def said(self, text: str) -> None:
        """Takes one line about what is being done."""

    def planned(self, plan: Plan) -> None:
        """Takes the plan, at the start and whenever it changes."""

    def stepped(self, report: StepReport) -> None:
        """Takes one step done."""


@dataclass(slots=True)
class _Stop:
    """Whether somebody asked the run to stop."""

    asked: bool = False


@dataclass(frozen=True, slots=True)
class _Run:
    """A run that is ready for its next step."""

    options: TrainOptions
    workload: Workload
    step: Step | None
    position: Position
    batches: Iterator[Any]
    earlier: tuple[float, ...]
    ranks: Ranks


def train(options: TrainOptions, watch: Watcher) -> RunResult:
    """Trains until ``options.steps`` steps are done, or until it is interrupted; saves as it goes.

    Raises:
        ValueError: The folder, the target or an option is wrong.
        InfeasibleBudget: No plan fits the memory.
        RanOutOfMemory: A step found no memory; what was saved stays.
        LostRank: Another process of the run has gone.
        OSError: The disk is full or cannot be written.
    """
    with process_group(options.device) as ranks:
        return _train(options, watch if ranks.rank == 0 else _Silent(), ranks)


class _Silent:
    """A watcher that shows nothing: that of every rank but the first."""

    def said(self, text: str) -> None:
        """Nothing."""

    def planned(self, plan: Plan) -> None:
        """Nothing."""

    def stepped(self, report: StepReport) -> None:
        """Nothing."""


def _begin(options: TrainOptions, ranks: Ranks, *, is_there: bool) -> tuple[TrainOptions, int | None]:
    """Makes or checks the folder; the options, and the micro-batch size of the plan that is there."""
    if ranks.size > 1 and options.plain:
        raise ValueError("A plain run is one process: leave out --plain, or start one.")
    if ranks.size > 1 and options.resume and not is_there:
        options = replace(options, resume=False)  # see Note [Processes] 4
    if options.resume:
        check_resumable(options.out, options.as_json())
        stored = read_plan(options.out)
        return options, options.micro_batch_size if stored is None else stored.micro_batch_size
    if ranks.rank == 0:
        start_run(options.out, _content(options, None, ranks.size))
    return options, options.micro_batch_size


def _train(options: TrainOptions, watch: Watcher, ranks: Ranks) -> RunResult:
    """The run of one of the processes."""
    with ranks.together():
        is_there = (options.out / "run.json").exists()
    with ranks.together():
        options, pinned = _begin(options, ranks, is_there=is_there)
    if options.hard_cap_bytes is not None:
        cap(options.hard_cap_bytes)
        watch.said(f"hard cap: {format_bytes(options.hard_cap_bytes)} above what Python and torch hold")
    with _out_of_memory_named(options), _warnings_told(watch):
        run = _prepare(options, pinned, watch, ranks)
        result = _go(run, watch)
    if ranks.rank == 0:
        write_run(options.out, _content(options, result, ranks.size))
    return result


def cap(extra_bytes: int) -> None:
    """Caps this process; the worker threads start before, because their stacks count too."""
    warm = torch.ones(512, 512)
    _ = warm @ warm
    set_hard_cap(extra_bytes)


def _prepare(options: TrainOptions, pinned: int | None, watch: Watcher, ranks: Ranks) -> _Run:
    """Builds the workload, loads the last checkpoint if resuming, and plans."""
    seed_everything(options.seed)
    watch.said(f"building {options.target}")
    with ranks.together():
        workload = load_target(
            options.target, batch_size=options.batch_size, seed=options.seed, device=options.device
        )
        position, drawn = Position(0), None
        checkpoint = latest_checkpoint(options.out) if options.resume else None
        if checkpoint is not None:
            position, drawn = load_checkpoint(checkpoint, workload.model, workload.optimizer)
            watch.said(f"resuming after step {position.step}")
        earlier = cut_losses(options.out, position.step) if options.resume and ranks.rank == 0 else ()
        workload.model.train()
    step = None
    if not options.plain and position.step < options.steps:
        micro = position.micro_batch_size or pinned
        step = _fit(workload, options, replace(position, micro_batch_size=micro), watch, ranks)
        lines = _advice(workload, step, ranks)
        if lines:
            watch.said(block(lines))
    # The training itself starts from the seed, whatever building and planning drew.
    seed_everything(options.seed)
    if drawn is not None:
        drawn.restore()
    batches = with_own_randomness(workload.batches_from(position.step), options.seed)
    return _Run(options, workload, step, position, batches, earlier, ranks)


def seed_everything(seed: int) -> None:
    """Starts every generator from ``seed``."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def with_own_randomness(batches: Iterator[Any], seed: int) -> Iterator[Any]:
    """Yields ``batches``, drawn from generators of their own that start from ``seed``.

    A shuffling loader draws from the global generator. Training (dropout) draws from it too, so that the
    order of the data would depend on what was trained between, and a resumed run could not find it again.
    """
    training = RandomState.capture()
    seed_everything(seed)
    data = RandomState.capture()
    training.restore()
    while True:
        training = RandomState.capture()
        data.restore()
        try:
            batch = next(batches)
        finally:
            data = RandomState.capture()
            training.restore()
        yield batch


def _fit(workload: Workload, options: TrainOptions, position: Position, watch: Watcher, ranks: Ranks) -> Step:
    """Returns the planned step, and stores its plan before anything depends on it."""
    watch.said("recording one step and planning")
    batch = own_rows(next(workload.batches_from(position.step)), ranks)
    model = workload.model
    if ranks.size > 1:
        model = torch.nn.parallel.DistributedDataParallel(model)
        watch.said(f"{ranks.size} processes, each with its share of the batch")
    step = fit(
        model,
        workload.loss_fn,
        batch,
        memory=options.memory,
        optimizer=workload.optimizer,
        micro_batch_size=position.micro_batch_size,
        count=workload.count,
        batch_norm=workload.batch_norm,
        outputs_fn=workload.outputs_fn,
        profile=read_profile(options.out) if options.resume else None,
    )
    if ranks.rank == 0:
        write_plan(options.out, step.plan, step.profile)
    if step.audit is not None:
        watch.said(str(step.audit).splitlines()[0])
    watch.planned(step.plan)
    return step


def _advice(workload: Workload, step: Step, ranks: Ranks) -> tuple[str, ...]:
    """Returns what could be done besides the plan, in seconds of the speed known by now."""
    epoch = workload.rows_per_epoch(step.plan.rows * ranks.size)
    return advice(step.profile, step.plan, rows_per_epoch=epoch, betas=workload.betas)


def _go(run: _Run, watch: Watcher) -> RunResult:
    """Trains to the end or to the first request to stop; the last step done is always saved."""
    options, done = run.options, run.position.step
    losses, plain_s = list(run.earlier), list[float]()
    measured: int | None = None
    rescued = 0
    with _loss_log(run) as log, _stop_on_signal() as stop:
        asked = False
        while done < options.steps and not asked:
            batch = next(run.batches)
            if done == run.position.step and _is_asked(run, stop):
                break  # nothing is half done yet, and the first step is the longest
            amount = _amount(batch)
            batch = own_rows(batch, run.ranks)
            if run.ranks.rank > 0:
                seed_everything(hash((options.seed, run.ranks.rank, done)) % 2**63)
            plan = None if run.step is None else run.step.plan
            metered = _is_metered(run, done + 1)
            started = time.perf_counter()
            loss, peak_bytes = _one_step(run, batch, metered)
            seconds = time.perf_counter() - started
            done += 1
            if _rescues(run.step) > rescued:
                rescued, measured = _rescues(run.step), None  # what was measured is another plan's peak
            else:
                measured = _largest(measured, peak_bytes, _verified_bytes(run.step))
            losses.append(loss)
            asked = _logged(run, log, (done, loss, seconds), stop)
            if done > run.position.step + _WARM_STEPS:
                plain_s.append(seconds)
            _note_new_plan(run, plan, watch)
            watch.stepped(StepReport(done, options.steps, loss, seconds, *amount, measured))
            if done % options.save_every == 0 or done == options.steps or asked:
                _save(run, log, done)
    return _result(run, losses, measured, plain_s, interrupted=done < options.steps)


def _loss_log(run: _Run) -> AbstractContextManager[LossLog | None]:
    """The losses on the disk, which rank 0 writes."""
    return LossLog(run.options.out) if run.ranks.rank == 0 else nullcontext()


def _logged(run: _Run, log: LossLog | None, entry: tuple[int, float, float], stop: _Stop) -> bool:
    """Writes down a step; whether any rank was asked to stop."""
    failure: Exception | None = None
    try:
        if log is not None:
            log.add(*entry)
    except OSError as error:
        failure = error
    return _is_asked(run, stop, failure)


def _is_asked(run: _Run, stop: _Stop, failure: Exception | None = None) -> bool:
    """Whether any rank was asked to stop; a meeting, which raises what has gone wrong on one of them."""
    return any(asked for (asked,) in run.ranks.table([stop.asked], failure))


def _save(run: _Run, log: LossLog | None, done: int) -> None:
    """Saves a checkpoint on rank 0; the others wait for it."""
    with run.ranks.together():
        if log is not None:
            log.sync()
            save_checkpoint(run.options.out, _position(run, done), run.workload.model, run.workload.optimizer)


def _position(run: _Run, done: int) -> Position:
    """Returns the position after ``done`` steps."""
    return Position(done, None if run.step is None else run.step.plan.micro_batch_size)


def _is_metered(run: _Run, number: int) -> bool:
    """Returns whether the allocator's account of step ``number`` is taken.

    A plain step is metered twice, for the second is the first with optimizer state from its start. memfit
    meters its own first two, so its third is metered here, the update included. The account is kept in
    memory, so there is none under a hard cap.
    """
    nth = number - run.position.step
    return run.options.hard_cap_bytes is None and nth in ((1, 2) if run.step is None else (3,))


def _one_step(run: _Run, batch: Any, metered: bool) -> tuple[float, int | None]:
    """Runs one whole training step; returns its loss and, if ``metered``, its peak in bytes."""
    body = run.step if run.step is not None else plain_body(run.workload)
    if not metered:
        return forward_backward_update(run.workload, body, batch), None
    entry_bytes = resident_bytes(resident(run.workload, batch))
    entry_bytes += 0 if run.step is None else run.step.held_bytes
    with PeakMeter(_device(run.workload)) as meter:
        loss = forward_backward_update(run.workload, body, batch)
    return loss, int(run.ranks.most(entry_bytes + meter.peak_bytes))


def resident(workload: Workload, batch: Any) -> Iterator[torch.Tensor]:
    """Yields the tensors that are alive on the training device before a step."""
    device = _device(workload)
    everything = [*workload.model.parameters(), *workload.model.buffers(), *_leaves(batch)]
    for state in workload.optimizer.state.values():
        everything += [value for value in state.values() if isinstance(value, torch.Tensor)]
    yield from (tensor for tensor in everything if tensor.device == device)


def forward_backward_update(workload: Workload, body: Callable[[Any], torch.Tensor], batch: Any) -> float:
    """Runs the step, the optimizer and ``zero_grad``; returns the loss.

    Raises:
        RanOutOfMemory: In the update, which cannot be taken back: some parameters may be updated by then.
    """
    loss = body(batch)
    try:
        workload.optimizer.step()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise RanOutOfMemory(
            f"Out of memory in optimizer.step(): {asked_for(str(error))}. The update may be half done, so "
            "it is not saved: the last checkpoint stays, go on from it with --resume. Free memory first, or "
            "take an optimizer that holds less."
        ) from error
    workload.optimizer.zero_grad()
    return float(loss)


def plain_body(workload: Workload) -> Callable[[Any], torch.Tensor]:
    """Returns the step as everybody writes it."""

    def body(batch: Any) -> torch.Tensor:
        loss = weighted_loss(workload.model, whole_loss(workload.loss_fn, workload.outputs_fn), batch, None)
        loss.backward()
        return loss.total.detach()

    return body


def _rescues(step: Step | None) -> int:
    """Returns how many steps ran out of memory and were run again."""
    return 0 if step is None else len(step.rescues)


class _Warnings(logging.Handler):
    """Tells a watcher what memfit warns of: steps that were run again, retries of CUDA's allocator."""

    def __init__(self, watch: Watcher) -> None:
        super().__init__(logging.WARNING)
        self._watch = watch

    def emit(self, record: logging.LogRecord) -> None:
        """Passes a line on."""
        self._watch.said(record.getMessage())


@contextmanager
def _warnings_told(watch: Watcher) -> Iterator[None]:
    """Passes memfit's warnings on while the body runs."""
    handler, log = _Warnings(watch), logging.getLogger("memfit")
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


def _note_new_plan(run: _Run, before: Plan | None, watch: Watcher) -> None:
    """Stores the plan if the step has corrected it, and shows it if it has planned again."""
    if run.step is not None and before is not None and run.step.plan is not before:
        if run.ranks.rank == 0:
            write_plan(run.options.out, run.step.plan, run.step.profile)
        if _decided(run.step.plan) != _decided(before):
            watch.planned(run.step.plan)


def _verified_bytes(step: Step | None) -> int | None:
    """Returns the peak the step has measured of itself, if it has."""
    return None if step is None or step.verdict is None else step.verdict.measured_peak_bytes


def _decided(plan: Plan) -> tuple[object, ...]:
    """Returns all of a plan but its seconds, which a real step corrects."""
    return plan.micro_batch_size, plan.predicted_peak_bytes, plan.recompute, plan.levels


def _retries(step: Step | None) -> int:
    """Returns how often CUDA's allocator had to make room in the last verified step."""
    return 0 if step is None or step.verdict is None else step.verdict.alloc_retries


def _largest(*values: int | None) -> int | None:
    """Returns the largest of the values that are there."""
    return max((value for value in values if value is not None), default=None)


def _result(
    run: _Run, losses: list[float], measured: int | None, plain_s: list[float], *, interrupted: bool
) -> RunResult:
    """Returns what the run came to; a peak above the prediction or the budget is not held."""
    plan = None if run.step is None else run.step.plan
    held: bool | None = None
    if plan is not None and measured is not None:
        held = measured <= plan.predicted_peak_bytes <= plan.budget_bytes and not _retries(run.step)
    return RunResult(
        steps_done=len(losses),
        first_loss=losses[0] if losses else float("nan"),
        last_loss=losses[-1] if losses else float("nan"),
        measured_peak_bytes=measured,
        median_step_s=statistics.median(plain_s) if plain_s else None,
        plan=plan,
        held=held,
        interrupted=interrupted,
        out=run.options.out,
        advice=() if run.step is None else _advice(run.workload, run.step, run.ranks),
        is_first=run.ranks.rank == 0,
    )


def _content(options: TrainOptions, result: RunResult | None, processes: int) -> dict[str, Any]:
    """Returns what ``run.json`` says."""
    versions = {
        "memfit": memfit.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }
    return {
        "options": options.as_json(),
        "versions": versions,
        "processes": processes,
        "result": None if result is None else result.as_json(),
    }


def _plan_figures(plan: Plan) -> dict[str, Any]:
    """Returns the figures of a plan that a summary shows."""
    names = (
        "budget_bytes",
        "predicted_peak_bytes",
        "micro_batch_size",
        "gradient_accumulation_steps",
        "predicted_step_s",
        "forward_s",
        "recompute_s",
        "lower_bound_s",
        "optimality_gap",
        "recomputes",
    )
    return {name: getattr(plan, name) for name in names}


def _device(workload: Workload) -> torch.device:
    """Returns the device the model is on."""
    return next(workload.model.parameters()).device


def _amount(batch: Any) -> tuple[int, str]:
    """Returns how much a batch holds: tokens if it has an integer tensor [rows, length], else rows."""
    leaves = list(_leaves(batch))
    for leaf in leaves:
        if leaf.dim() == 2 and not leaf.is_floating_point():
            return leaf.numel(), "tokens"
    return (leaves[0].shape[0] if leaves and leaves[0].dim() else 1), "rows"


def _leaves(batch: Any) -> Iterator[torch.Tensor]:
    """Yields the tensors in dicts, lists and tuples."""
    if isinstance(batch, torch.Tensor):
        yield batch
    elif hasattr(batch, "values"):
        for value in batch.values():
            yield from _leaves(value)
    elif isinstance(batch, list | tuple):
        for value in batch:
            yield from _leaves(value)


@contextmanager
def _stop_on_signal() -> Iterator[_Stop]:
    """Turns the first Ctrl-C or SIGTERM into a request to stop after the step; the second interrupts."""
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _out_of_memory_named(options: TrainOptions) -> Iterator[None]:
    """Turns every way of running out of memory into one error that says what to do."""
    try:
        yield
    except RanOutOfMemory:
        raise
    except Exception as error:
        text = str(error)
        if not is_out_of_memory(error):
            raise
        cap = (
            f" under the hard cap of {format_bytes(options.hard_cap_bytes)}" if options.hard_cap_bytes else ""
        )
        cure = (
            "Leave out --plain and give --memory: memfit fits the same step into it."
            if options.plain
            else "Give a smaller --memory, or a larger --hard-cap: Python's own memory counts there too."
        )
        raise RanOutOfMemory(f"Out of memory{cap}: {asked_for(text)}. {cure}") from error


def asked_for(text: str) -> str:
    """Returns how much torch asked for in vain, read from its error, or else the first line of that."""
    asked = re.search(r"tried to allocate (\d+) bytes", text)
    if asked is None:
        return text.splitlines()[0] if text else "Python itself found no more"
    size_bytes = int(asked[1])
    return f"the step asked for another {format_bytes(size_bytes)} ({size_bytes:,} bytes) and did not get it"
