"""Profiles a model that torch.compile hides as a whole: only the micro-batch can be chosen.

Note [Opaque]
 1. No dispatch mode may look: under one, dynamo runs the model eagerly, now and perhaps ever after.
 2. So real steps are metered whole, each four times as large as the last while that surely fits, and the
    step is one op forward and one backward with the measured peak inside. Nothing in it can be replayed.
 3. The peak is a maximum of lines in the rows, so a size between two that were measured needs at most
    what lies on the line through both; beyond the largest it may need more, which the first step mends.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

import torch

from memfit.core.batching import balanced_parts
from memfit.core.costs import scaled
from memfit.core.graph import COMPILED, LogEntry, LogKind, Op, OpKey, StepGraph, Storage
from memfit.runtime.batch import rows_of
from memfit.runtime.job import Job, first_rows, prepare_gradients
from memfit.runtime.meter import PeakMeter
from memfit.runtime.micro import micro_batches, weighted_loss
from memfit.runtime.preserve import gradients_of_others

_FEW_ROWS = 4


def record_opaque(
    job: Job, place: torch.device, counts: tuple[int, ...], part: str, *, free_bytes: int | None
) -> list[StepGraph]:
    """One graph a number of micro-batches, from real steps of a few sizes.

    Args:
        part: What torch.compile hides.
        free_bytes: Memory that measuring may use beside parameters, gradients and batch; None: a few rows.
    """
    rows = rows_of(job.batch)
    ladders = {
        resident: _ladder(job, place, part, free_bytes, resident=resident)
        for resident in {count > 1 for count in counts}
    }
    prepare_gradients(job.model, resident=False)
    return [_between(ladders[count > 1], balanced_parts(rows, count)[0]) for count in counts]


def _ladder(
    job: Job, place: torch.device, part: str, free_bytes: int | None, *, resident: bool
) -> list[StepGraph]:
    """Metered steps of growing size."""
    rows = rows_of(job.batch)

    def metered(size: int) -> StepGraph:
        return _graph(size, part, *_metered(job, place, rows, size, resident=resident), resident=resident)

    few = min(_FEW_ROWS, rows)
    found = [metered(size) for size in sorted({max(1, few // 2), few})]
    while free_bytes is not None and found[-1].rows < rows:
        size = min(4 * found[-1].rows, rows)
        if found[-1].storages[0].size_bytes * size / found[-1].rows > free_bytes:
            break
        found.append(metered(size))
    return found


def run_plainly(job: Job, sizes: Iterable[int]) -> None:
    """Plain steps of some sizes, in which what is compiled at the first call is compiled."""
    rows = rows_of(job.batch)
    for size in sizes:
        prepare_gradients(job.model, resident=False)
        with micro_batches(job.model, job.batch_norm, several=False):
            loss = weighted_loss(job.model, job.loss_fn, first_rows(job.batch, rows, size), None)
            with gradients_of_others(loss.roots, job.model):
                loss.backward()


def _between(ladder: list[StepGraph], rows: int) -> StepGraph:
    """The graph of any size, from the two measured ones nearest to it."""
    above = next((i for i, graph in enumerate(ladder) if graph.rows >= rows), len(ladder) - 1)
    return scaled(ladder[max(0, above - 1)], ladder[above], rows)


def _metered(job: Job, place: torch.device, rows: int, few: int, *, resident: bool) -> tuple[int, float]:
    """Peak bytes and seconds of a real step of a few rows; the first step pays for compilation."""
    part = first_rows(job.batch, rows, few)
    for _ in range(2):
        prepare_gradients(job.model, resident=resident)
        start_s = time.perf_counter()
        with micro_batches(job.model, job.batch_norm, several=resident), PeakMeter(place) as meter:
            loss = weighted_loss(job.model, job.loss_fn, part, None if few == rows else few / rows)
            with gradients_of_others(loss.roots, job.model):
                loss.backward()
            del loss
        seconds = time.perf_counter() - start_s
    return meter.peak_bytes, seconds


def _graph(rows: int, part: str, peak_bytes: int, seconds: float, *, resident: bool) -> StepGraph:
    """A step that is one block of memory, there from its first op to its last."""
    forward = Op(OpKey("", f"{COMPILED}{part}", 0), allocates=(0,), seconds=seconds / 3)
    backward = Op(OpKey("", f"{COMPILED}{part} backward", 0), seconds=seconds * 2 / 3)
    return StepGraph(
        rows=rows,
        forward_ops=1,
        gradients_resident=resident,
        ops=(forward, backward),
        storages=(Storage(peak_bytes),),
        values=(),
        saves=(),
        log=(LogEntry(LogKind.OP, 0), LogEntry(LogKind.OP, 1), LogEntry(LogKind.FREE, 0)),
    )
