"""Profiles a model of which torch.compile hides the ops: only the micro-batch can be chosen.

Note [Opaque]
 1. No dispatch mode may look: under one, dynamo runs the model eagerly, now and perhaps ever after.
 2. So real steps are metered whole, each four times as large as the last while that surely fits, and the
    step is one op forward and one backward with the measured peak inside. Nothing in it can be replayed.
 3. The peak is a maximum of lines in the rows, so a size between two that were measured needs at most
    what lies on the line through both; beyond the largest it may need more, which the first step mends.
"""

from __future__ import annotations

import time

import torch
from torch import nn

from memfit.core.batching import balanced_parts
from memfit.core.costs import scaled
from memfit.core.graph import LogEntry, LogKind, Op, OpKey, StepGraph, Storage
from memfit.runtime.batch import rows_of
from memfit.runtime.job import Job, first_rows, prepare_gradients
from memfit.runtime.meter import PeakMeter
from memfit.runtime.micro import micro_batches, weighted_loss
from memfit.runtime.preserve import gradients_of_others

_FEW_ROWS = 4


def compiled_part(model: nn.Module) -> str | None:
    """The name of the first module under torch.compile, the model's class if it is the model itself."""
    for name, module in model.named_modules():
        if hasattr(module, "_orig_mod") or module.__dict__.get("_compiled_call_impl") is not None:
            return name or type(model).__name__
    return None


def record_opaque(
    job: Job, place: torch.device, counts: tuple[int, ...], *, free_bytes: int | None
) -> list[StepGraph]:
    """One graph a number of micro-batches, from real steps of a few sizes.

    Args:
        free_bytes: Memory that measuring may use beside parameters, gradients and batch; None: a few rows.
    """
    rows = rows_of(job.batch)
    ladders = {
        resident: _ladder(job, place, rows, free_bytes, resident=resident)
        for resident in {count > 1 for count in counts}
    }
    prepare_gradients(job.model, resident=False)
    return [_between(ladders[count > 1], balanced_parts(rows, count)[0]) for count in counts]


def _ladder(
    job: Job, place: torch.device, rows: int, free_bytes: int | None, *, resident: bool
) -> list[StepGraph]:
    """Metered steps of growing size."""
    few = min(_FEW_ROWS, rows)
    found = [_metered(job, place, rows, size, resident=resident) for size in sorted({max(1, few // 2), few})]
    while free_bytes is not None and found[-1].rows < rows:
        size = min(4 * found[-1].rows, rows)
        if found[-1].storages[0].size_bytes * size / found[-1].rows > free_bytes:
            break
        found.append(_metered(job, place, rows, size, resident=resident))
    return found


def _between(ladder: list[StepGraph], rows: int) -> StepGraph:
    """The graph of any size, from the two measured ones nearest to it."""
    above = next((i for i, graph in enumerate(ladder) if graph.rows >= rows), len(ladder) - 1)
    return scaled(ladder[max(0, above - 1)], ladder[above], rows)


def _metered(job: Job, place: torch.device, rows: int, few: int, *, resident: bool) -> StepGraph:
    """A real step of a few rows as a graph of two ops; the first step pays for compilation."""
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
    return _graph(few, meter.peak_bytes, seconds, resident=resident)


def _graph(rows: int, peak_bytes: int, seconds: float, *, resident: bool) -> StepGraph:
    """A step that is one block of memory, there from its first op to its last."""
    forward = Op(OpKey("", "compiled forward", 0), allocates=(0,), seconds=seconds / 3)
    backward = Op(OpKey("", "compiled backward", 0), seconds=seconds * 2 / 3)
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
