"""The comparison behind ``memfit compare``: a step run plain, with every block checkpointed, and by memfit.

Note [Comparison]
 1. Each way runs in a process of its own, one after the other, on the same weights, data and seed: one that
    dies of memory takes nothing with it, and none of them finds the memory or the caches of another.
 2. A few steps warm up, some are timed (the median counts), and in one more the allocator's account is taken,
    ``optimizer.step()`` included. Where memfit's own account of its first steps is higher, that one counts.
 3. A hard cap holds for each process and is lifted before the last step: the account takes memory too.
 4. Losses are compared step by step with those of the first way that came to its end. Micro-batches add up
    in another order, and draw dropout masks of their own; what runs the batch whole is the same to the bit.
 5. What the workload prints goes to stderr.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import Enum
from multiprocessing.connection import Connection
from typing import Any, Final

import torch

from memfit.api import Step, apply_gradient_checkpointing, fit
from memfit.errors import InfeasibleBudget, MemfitError
from memfit.runtime.meter import (
    PeakMeter,
    device_memory,
    lift_hard_cap,
    resident_bytes,
)
from memfit.runtime.rescue import is_out_of_memory
from memfit.train import (
    asked_for,
    cap,
    forward_backward_update,
    plain_body,
    resident,
    seed_everything,
    with_own_randomness,
)
from memfit.units import parse_memory
from memfit.workload import Workload, load_target

WARM_STEPS: Final = 3


class Way(Enum):
    """How a step is run."""

    PLAIN = "plain"
    CHECKPOINTED = "every block"  # as `memfit frontier` calls it
    MEMFIT = "memfit"


class End(Enum):
    """What became of a way."""

    DONE = "done"
    OUT_OF_MEMORY = "out of memory"
    NO_PLAN = "no plan fits"
    NOT_POSSIBLE = "not possible"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Request:
    """What is compared: ``steps`` timed ones of a target, within ``memory``."""

    target: str
    memory: str
    steps: int
    batch_size: int | None = None
    seed: int = 0
    device: str | None = None
    hard_cap_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one way came to.

    Attributes:
        detail: What it died of or why it is not possible; of memfit its plan in words.
        memory_bytes: The stated memory, once the device is known of which it may be a share.
        losses: Of every step, those that warm up and the last one included.
        draws: Whether it draws other random numbers than the whole batch does.
    """

    way: Way
    end: End
    detail: str = ""
    memory_bytes: int | None = None
    median_step_s: float | None = None
    measured_peak_bytes: int | None = None
    losses: tuple[float, ...] = ()
    draws: bool = False

    @property
    def is_within(self) -> bool | None:
        """Whether its peak is at most the stated memory; None where it has none."""
        if self.measured_peak_bytes is None or self.memory_bytes is None:
            return None
        return self.measured_peak_bytes <= self.memory_bytes


@dataclass(frozen=True, slots=True)
class Comparison:
    """All ways, in the order in which they ran."""

    outcomes: tuple[Outcome, ...]

    def of(self, way: Way) -> Outcome:
        """What a way came to."""
        return next(outcome for outcome in self.outcomes if outcome.way is way)

    def loss_difference(self, outcome: Outcome) -> float | None:
        """The largest relative difference of a loss to the first way that is done; None for that one."""
        done = [other for other in self.outcomes if other.losses]
        if not outcome.losses or outcome is done[0]:
            return None
        return max(map(_relative, outcome.losses, done[0].losses), default=0.0)

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"ways": [self._way_as_json(outcome) for outcome in self.outcomes]}

    def _way_as_json(self, outcome: Outcome) -> dict[str, Any]:
        """One way."""
        more = {"is_within": outcome.is_within, "loss_difference": self.loss_difference(outcome)}
        return asdict(outcome) | {"way": outcome.way.value, "end": outcome.end.value} | more


def compare(request: Request, said: Callable[[str], None]) -> Comparison:
    """Runs each way in turn. See Note [Comparison].

    Args:
        said: Takes a line about what is being done.

    Raises:
        ValueError: The target, the memory or the cap is wrong.
    """
    outcomes = []
    for way in Way:
        said(f"{way.value}: {WARM_STEPS} steps to warm up, {request.steps} timed")
        outcomes.append(_in_a_process(request, way))
    return Comparison(tuple(outcomes))


def _in_a_process(request: Request, way: Way) -> Outcome:
    """What a way comes to in a process of its own."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(request, way, sender))
    child.start()
    sender.close()
    try:
        answer: Outcome | str = receiver.recv()
    except EOFError:
        answer = _of_the_dead(way, child)
    except BaseException:
        child.terminate()
        raise
    finally:
        child.join()
    if isinstance(answer, str):
        raise ValueError(answer)
    return answer


def _of_the_dead(way: Way, child: Any) -> Outcome:
    """The outcome of a process that said nothing: Linux kills what takes the last memory."""
    child.join()
    if child.exitcode == -signal.SIGKILL:
        return Outcome(
            way, End.OUT_OF_MEMORY, "the system killed the process, as it does where memory is short"
        )
    return Outcome(way, End.FAILED, f"its process ended with code {child.exitcode}; the error is above")


def _child(request: Request, way: Way, sender: Connection) -> None:
    """Runs a way and sends what it came to, or the text of an error in what was asked."""
    os.dup2(2, 1)  # what the workload prints must not come between the data
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the parent says that it was interrupted
    sender.send(run_way(request, way))


def run_way(request: Request, way: Way) -> Outcome | str:
    """What a way comes to in this process; the text of an error in what was asked.

    Memory that runs out is an outcome, too. A hard cap binds this process until the last step.
    """
    memory_bytes: int | None = None
    try:
        seed_everything(request.seed)
        work = load_target(
            request.target, batch_size=request.batch_size, seed=request.seed, device=request.device
        )
        memory_bytes = _memory_bytes(request.memory, work)
        return _run(request, way, work, memory_bytes)
    except InfeasibleBudget as error:
        return Outcome(way, End.NO_PLAN, str(error), memory_bytes)
    except Exception as error:
        if is_out_of_memory(error):
            return Outcome(way, End.OUT_OF_MEMORY, asked_for(str(error.__cause__ or error)), memory_bytes)
        if not isinstance(error, (MemfitError, ValueError, TypeError, OSError)):
            raise
        if way is Way.PLAIN or memory_bytes is None:
            return str(error)
        return Outcome(way, End.NOT_POSSIBLE, str(error), memory_bytes)


def _memory_bytes(memory: str, work: Workload) -> int:
    """The stated memory; a share is of the device that the workload is on."""
    place = next(work.model.parameters()).device
    is_share = memory.strip().endswith("%")
    return parse_memory(memory, total_bytes=device_memory(place)[1] if is_share else None)


def _run(request: Request, way: Way, work: Workload, memory_bytes: int) -> Outcome:
    """All steps of a way."""
    work.model.train()
    if way is Way.CHECKPOINTED:
        apply_gradient_checkpointing(work.model)
    if request.hard_cap_bytes is not None:
        cap(request.hard_cap_bytes)
    step = _fitted(work, memory_bytes) if way is Way.MEMFIT else None
    body = plain_body(work) if step is None else step
    seed_everything(request.seed)  # whatever building and planning drew
    batches = with_own_randomness(work.batches_from(0), request.seed)
    losses, seconds = _timed(work, body, batches, WARM_STEPS + request.steps)
    if request.hard_cap_bytes is not None:
        lift_hard_cap()
    loss, peak_bytes = _metered(work, step, body, next(batches))
    plan = None if step is None else step.plan
    return Outcome(
        way,
        End.DONE,
        detail="" if plan is None else str(plan),
        memory_bytes=memory_bytes,
        median_step_s=statistics.median(seconds[WARM_STEPS:]),
        measured_peak_bytes=peak_bytes,
        losses=(*losses, loss),
        draws=step is not None and step.plan.gradient_accumulation_steps > 1 and _is_random(step),
    )


def _fitted(work: Workload, memory_bytes: int) -> Step:
    """memfit's step."""
    return fit(
        work.model,
        work.loss_fn,
        next(work.batches_from(0)),
        memory=memory_bytes,
        optimizer=work.optimizer,
        count=work.count,
        batch_norm=work.batch_norm,
        outputs_fn=work.outputs_fn,
    )


def _timed(
    work: Workload, body: Callable[[Any], torch.Tensor], batches: Iterator[Any], steps: int
) -> tuple[list[float], list[float]]:
    """Losses and seconds of some steps. Reading the loss waits for the device."""
    losses, seconds = list[float](), list[float]()
    for _ in range(steps):
        batch = next(batches)
        started_s = time.perf_counter()
        losses.append(forward_backward_update(work, body, batch))
        seconds.append(time.perf_counter() - started_s)
    return losses, seconds


def _metered(
    work: Workload, step: Step | None, body: Callable[[Any], torch.Tensor], batch: Any
) -> tuple[float, int]:
    """Loss and peak bytes of one more step."""
    entry_bytes = resident_bytes(resident(work, batch)) + (0 if step is None else step.held_bytes)
    with PeakMeter(next(work.model.parameters()).device) as meter:
        loss = forward_backward_update(work, body, batch)
    verdict = None if step is None else step.verdict
    earlier_bytes = 0 if verdict is None else verdict.measured_peak_bytes
    return loss, max(entry_bytes + meter.peak_bytes, earlier_bytes)


def _is_random(step: Step) -> bool:
    """Whether a forward draws random numbers."""
    graph = step.profile.graph(step.plan.micro_batch_size)
    return any(op.is_random for op in graph.ops)


def _relative(loss: float, other: float) -> float:
    """How far a loss is from another, as a share of it."""
    if loss == other or (math.isnan(loss) and math.isnan(other)):
        return 0.0
    return abs(loss - other) / max(abs(other), 1e-30)
