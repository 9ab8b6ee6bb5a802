"""Profiles a training step: what it does at each micro-batch size, and what that costs.

Note [Profiling]
 1. Shapes, bytes and lives come from fake tensors, at the true sizes, without memory.
 2. Seconds and the temporaries inside operators come from two real steps of a few rows, where there is a
    real model and they fit ``limit_bytes``; elsewhere from a roofline, and temporaries are not known. Ops
    that have some run once more at the most rows, each alone, for temporaries grow in ways of their own.
 3. A model that reads its data (``.item()``, ``.all()`` of a mask) may fail on fakes, or take another way
    there. Where the real steps ran other ops, they are recorded instead, and bytes follow the line
    through their two sizes, which is exact as long as both did the same ops.
 4. Nothing is left behind: parameters, buffers, attributes, gradients and random streams are as before.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from memfit.core.allocator import MIN_BLOCK_BYTES
from memfit.core.batching import candidate_part_counts, parts_for
from memfit.core.costs import (
    Measured,
    fixed_share,
    with_costs,
    with_made_bytes,
    with_overhead,
    with_seconds_of,
)
from memfit.core.costs import measured as measured_costs
from memfit.core.devices import Device, device_named
from memfit.core.graph import EMPTY_GRAPH, Profile, Residents, StepGraph, in_blocks
from memfit.core.timeline import run
from memfit.errors import UnsupportedModel
from memfit.runtime.arguments import check_micro_batch_size
from memfit.runtime.basis import basis_of
from memfit.runtime.batch import detached, rows_of, tensors_of
from memfit.runtime.compiled import (
    HiddenWrite,
    compiled_part,
    compiled_regions,
    hidden_function,
    replays_graphs,
    size_for_graphs,
)
from memfit.runtime.engines import engine_of, job_of
from memfit.runtime.fake import is_fake, untouched
from memfit.runtime.hooks import silenced
from memfit.runtime.job import Job, Optimizers, check_model, optimizer_state
from memfit.runtime.measure import SMALL_BYTES, measurable_rows, measure, measured_alone, temporaries_at
from memfit.runtime.meter import resident_sizes
from memfit.runtime.micro import Loss, LossFn, OutputsFn, OutputsLoss, whole_loss
from memfit.runtime.normalisation import check_batch_norm
from memfit.runtime.opaque import record_opaque
from memfit.runtime.preserve import (
    contents_of,
    no_gradients,
    same_random_streams,
    small_buffer_sizes,
)
from memfit.runtime.record import Recording
from memfit.runtime.sizes import fakes_agree, record_loss_of_all, record_really, record_sizes, residents_of
from memfit.runtime.update import Update, with_real_costs

_log = logging.getLogger("memfit")

REPLAY_OVERHEAD_S = 5e-5  # of one replayed op, its record included; half as much with warm caches
_FEW_NUMBERS_BYTES = 64  # the running loss while the next micro-batch runs, numbers an optimizer counts by
_DISPATCH_S = 4e-6  # of any op in eager mode, whatever its size


def profile(
    model: nn.Module,
    loss_fn: LossFn | Callable[[Any, Any], Loss],
    batch: Any,
    *,
    optimizer: Optimizers = None,
    micro_batch_size: int | None = None,
    limit_bytes: int | None = None,
    device: str | Device | None = None,
    outputs_fn: OutputsFn | None = None,
    batch_norm: str = "exact",
) -> Profile:
    """What one step of the effective batch does, at every micro-batch size worth considering.

    Args:
        model: Real, fake or on ``meta``; on one device.
        loss_fn: ``loss_fn(model, batch) -> scalar tensor``, or a mapping of terms.
        batch: The effective batch; its tensors share the first dimension, the rows.
        optimizer: Counts its state and its step into the peak; a list of several, all of theirs.
        micro_batch_size: Only this size.
        limit_bytes: Memory that measuring may use; None: 1 GiB beyond parameters and what belongs to them.
        device: What a model without data is planned for, such as ``"h100"``: its speeds, and blocks as its
            allocator rounds them. Default: the speeds of a large accelerator.
        outputs_fn: ``outputs_fn(model, batch)``; then it is ``loss_fn(outputs, batch)``, and several
            micro-batches are run in two passes, as a loss that couples the rows needs.
        batch_norm: As in :func:`memfit.fit`.

    Raises:
        ValueError: The batch is empty, the loss is no scalar or has no graph, nothing is trainable, or no
            device or ``batch_norm`` is called so.
        InexactAccumulation: The rows of the batch do not agree, or outputs have none.
        UnsupportedModel: Parameters on several devices, or a layer cannot be as ``batch_norm`` says.
    """
    loss = whole_loss(loss_fn, outputs_fn)
    job = job_of(engine_of(model), loss, batch, optimizer, batch_norm)
    job = job._replace(is_two_pass=outputs_fn is not None)
    return profile_job(job, micro_batch_size=micro_batch_size, limit_bytes=limit_bytes, device=device)


def profile_job(
    job: Job,
    *,
    micro_batch_size: int | None = None,
    limit_bytes: int | None = None,
    device: str | Device | None = None,
) -> Profile:
    """The same of a job."""
    place = check_model(job.model)
    card = device_named(device) if isinstance(device, str) else device
    job = job._replace(batch=detached(job.batch))
    rows = rows_of(job.batch)
    counts = _counts(rows, size_for_graphs(job.model, place, rows, micro_batch_size))
    real = not any(is_fake(p) for p in job.model.parameters())
    check_batch_norm(job.model, job.batch_norm, compiled_part(job.model))
    whole = _hidden_whole(job, real=real)
    if whole is not None:
        return _opaque(job, place, counts, whole, limit_bytes)
    try:
        return _profiled(job, place, counts, card, limit_bytes)
    except HiddenWrite as error:
        return _opaque(job, place, counts, error.owner, limit_bytes)


def _hidden_whole(job: Job, *, real: bool) -> str | None:
    """What hides so much that only the micro-batch can be chosen, if anything does; see Note [Opaque]."""
    regions = compiled_regions(job.model)
    part = compiled_part(job.model)
    if part is not None and (not real or not regions[0].name or job.is_two_pass):
        return part
    graphs = replays_graphs(regions) if next(job.model.parameters()).device.type == "cuda" else None
    return graphs or hidden_function(job.model, _functions_of(job.loss_fn))


def _functions_of(loss_fn: LossFn) -> list[object]:
    """The user's own functions in a loss."""
    if isinstance(loss_fn, OutputsLoss):
        return [loss_fn.outputs_fn, loss_fn.of_outputs]
    return [loss_fn]


def _profiled(
    job: Job, place: torch.device, counts: tuple[int, ...], card: Device | None, limit_bytes: int | None
) -> Profile:
    """The profile of a model whose ops can be seen, but for compiled modules among them."""
    real = not any(is_fake(p) for p in job.model.parameters())
    graphs, residents, update, points, loss_of_all = _recorded(job, place, counts, card, limit_bytes)
    alignment_bytes = _alignment_bytes(place, None if real else card)
    is_asynchronous = place.type == "cuda" or not real
    return Profile(
        rows=rows_of(job.batch),
        graphs=tuple(with_overhead(g, REPLAY_OVERHEAD_S, is_asynchronous=is_asynchronous) for g in graphs),
        residents=_in_blocks(residents, update, alignment_bytes),
        first_update=update.first.graph,
        update=update.later.graph,
        fixed_s=_fixed_s(graphs[0], points),
        alignment_bytes=alignment_bytes,
        unexplained_bytes=_unexplained_bytes(job, place),
        source=_source(points, card),
        basis=basis_of(job),
        loss_of_all=loss_of_all,
    )


def _recorded(
    job: Job, place: torch.device, counts: tuple[int, ...], card: Device | None, limit_bytes: int | None
) -> _Recorded:
    """The step at every size and its update, with what was measured, if anything was."""
    model, rows = job.model, rows_of(job.batch)
    points: tuple[Measured, Measured] | None = None
    more: list[Measured] = []
    with _unseen(model):
        recordings, residents, update, loss, by_fakes = record_sizes(job, rows, counts, card)
        free_bytes = None if limit_bytes is None else limit_bytes - residents.total_bytes
        if job.sharding is not None:
            most_rows = max(recording.graph.rows for recording in recordings)
            more = measured_alone(job, place, most_rows, free_bytes)
            points = more[0], more[-1]
            if job.optimizer is not None:
                update = with_real_costs(update, job.optimizer, free_bytes)
        elif not any(is_fake(p) for p in model.parameters()):
            with contents_of(model):
                points = measure(job, place, measurable_rows(recordings, residents, rows, limit_bytes))
                if points is not None and by_fakes and not fakes_agree(job, points[1]):
                    _log.info("fake tensors take another way through the model; recording really")
                    recordings, residents, update, loss, by_fakes = record_really(job, rows, counts)
            free_bytes = None if limit_bytes is None else limit_bytes - residents.total_bytes
            if points is not None and by_fakes:
                most_rows = max(recording.graph.rows for recording in recordings)
                least_rows = min(recording.graph.rows for recording in recordings)
                # One row is a size of its own (what is contiguous there) and tells nothing of others.
                sizes = {2, 4, most_rows} if points[1].rows == 1 else {most_rows, least_rows}
                found = [temporaries_at(job, place, points[1], size, free_bytes) for size in sorted(sizes)]
                more = [point for point in found if point is not None]
            if job.optimizer is not None:
                update = with_real_costs(update, job.optimizer, free_bytes)
            if loss is not None and by_fakes:
                there_bytes = residents.total_bytes - residents.gradients_bytes  # which come after it
                room_bytes = SMALL_BYTES if limit_bytes is None else limit_bytes - there_bytes
                loss = _measured_loss(job, loss, recordings, room_bytes)
    graphs, loss_of_all = _priced(recordings, points, more, by_fakes), _own_costs(loss)
    if points is not None:
        graphs = [with_seconds_of(loss_of_all, graph, but=points[1]) for graph in graphs]
    return _Recorded(graphs, residents, update, points, loss_of_all)


def _measured_loss(job: Job, loss: Recording, recordings: list[Recording], room_bytes: int) -> Recording:
    """The loss between two passes with real costs, where it fits; it has one size, that of the batch."""
    if any(is_fake(p) for p in job.model.parameters()) or run(loss.graph).peak.total_bytes > room_bytes:
        return loss
    with contents_of(job.model):
        record_loss_of_all(job, recordings)  # the first run pays for what is built once
        return record_loss_of_all(job, recordings) or loss


def _own_costs(recording: Recording | None) -> StepGraph:
    """A recorded graph with what its own ops took."""
    if recording is None:
        return EMPTY_GRAPH
    took = measured_costs(recording.graph, recording.signatures, recording.peaks)
    return with_costs(recording.graph, took, took)


class _Recorded(NamedTuple):
    """The step at every size, its update, what was measured, and what runs between two passes."""

    graphs: list[StepGraph]
    residents: Residents
    update: Update
    points: tuple[Measured, Measured] | None
    loss_of_all: StepGraph


@contextmanager
def _unseen(model: nn.Module) -> Iterator[None]:
    """Steps in the body leave no trace, and no gradient hook sees them. See Note [Profiling] 4."""
    with (
        same_random_streams(),
        untouched(model),
        no_gradients(model),
        torch.enable_grad(),
        silenced(model.parameters()),
    ):
        yield


def _priced(
    recordings: list[Recording],
    points: tuple[Measured, Measured] | None,
    more: list[Measured],
    by_fakes: bool,
) -> list[StepGraph]:
    """The recorded graphs with what was measured; a scaled one also with the bytes its ops really made."""
    graphs = [recording.graph for recording in recordings]
    if points is None:
        return graphs
    graphs = [with_costs(graph, *points, more) for graph in graphs]
    return graphs if by_fakes else [with_made_bytes(graph, *points) for graph in graphs]


def _alignment_bytes(place: torch.device, card: Device | None) -> int:
    """What an allocator rounds blocks up to: that of the device the step runs on, or is planned for."""
    return MIN_BLOCK_BYTES if place.type == "cuda" or card is not None else 1


def _in_blocks(residents: Residents, update: Update, block_bytes: int) -> Residents:
    """The residents as the allocator of the device rounds them."""
    if block_bytes == 1:
        return residents
    summed_bytes = None if residents.summed_bytes is None else in_blocks(residents.summed_sizes, block_bytes)
    state = [storage.size_bytes for storage in update.first.graph.storages if storage.persists]
    return replace(
        residents,
        parameters_bytes=in_blocks(residents.parameter_sizes, block_bytes),
        gradients_bytes=in_blocks(residents.gradient_sizes, block_bytes),
        optimizer_bytes=residents.optimizer_bytes - sum(state) + in_blocks(state, block_bytes),
        batch_bytes=in_blocks(residents.batch_sizes, block_bytes),
        summed_bytes=summed_bytes,
    )


def _source(points: tuple[Measured, Measured] | None, card: Device | None) -> str:
    """Where the seconds come from."""
    if points is not None:
        return f"measured at {points[0].rows} and {points[1].rows} rows"
    return "roofline" if card is None else f"roofline of {card.name}"


def _opaque(
    job: Job, place: torch.device, counts: tuple[int, ...], part: str, limit_bytes: int | None
) -> Profile:
    """The profile of a model that hides its ops; says so. Two passes are not tried with one."""
    if any(is_fake(p) for p in job.model.parameters()):
        raise UnsupportedModel(
            f"{part} is compiled by torch.compile, which hides its ops, and the model has no data to run: "
            "plan the module you gave to torch.compile (its ._orig_mod)",
            owner=part,
        )
    if job.sharding is not None:  # real steps would wait for the other ranks
        raise UnsupportedModel(
            f"{part} is compiled by torch.compile, which hides its ops, and under fully_shard no rank has "
            "all of the model to run: leave torch.compile out",
            owner=part,
        )
    warnings.warn(
        f"{part} is compiled by torch.compile, which hides its ops: memfit chooses the micro-batch and "
        "recomputes nothing. Give it the module itself (its ._orig_mod) to plan every tensor, or compile its "
        "blocks, each by itself, to plan what is outside of them",
        stacklevel=4,
    )
    with _unseen(job.model):
        residents, update = residents_of(job)
        free_bytes = None if limit_bytes is None else limit_bytes - residents.total_bytes
        with contents_of(job.model):
            counts = (1,) if job.is_two_pass else counts
            graphs = record_opaque(job, place, counts, part, free_bytes=free_bytes)
    return Profile(
        rows=rows_of(job.batch),
        graphs=tuple(graphs),
        residents=residents,
        first_update=update.first.graph,
        update=update.later.graph,
        alignment_bytes=_alignment_bytes(place, None),
        unexplained_bytes=_unexplained_bytes(job, place),
        source=f"{part} is compiled and opaque; measured at few rows",
        basis=basis_of(job),
    )


def _counts(rows: int, micro_batch_size: int | None) -> tuple[int, ...]:
    """Numbers of micro-batches to look at."""
    if micro_batch_size is None:
        return candidate_part_counts(rows)
    check_micro_batch_size(micro_batch_size, rows)
    return (len(parts_for(rows, micro_batch_size)),)


def _fixed_s(graph: StepGraph, points: tuple[Measured, Measured] | None) -> float:
    """Seconds of a micro-batch that do not grow with its rows: at least the dispatch of each op."""
    measured_s = 0.0 if points is None else fixed_share(*points) * sum(points[1].seconds.values())
    return max(measured_s, _DISPATCH_S * len(graph.ops))


def _unexplained_bytes(job: Job, place: torch.device) -> int:
    """What no recording shows: a few numbers, copies of buffers, what a hook makes; on CUDA cuBLAS's."""
    hooked_bytes = max((p.nbytes for p in job.model.parameters() if p._backward_hooks), default=0)
    few_bytes = _FEW_NUMBERS_BYTES + hooked_bytes  # what the hook of a gradient makes of it
    if place.type != "cuda" or any(is_fake(p) for p in job.model.parameters()):
        return few_bytes + sum(small_buffer_sizes(job.model))
    always_bytes = few_bytes + in_blocks(small_buffer_sizes(job.model), MIN_BLOCK_BYTES)
    known = [*job.model.parameters(), *job.model.buffers(), *(t for _, t in tensors_of(job.batch))]
    known += [p.grad for p in job.model.parameters() if p.grad is not None]
    known += optimizer_state(job.optimizer)
    on_device = in_blocks(resident_sizes(t for t in known if t.device == place), MIN_BLOCK_BYTES)
    return max(0, torch.cuda.memory_allocated(place) - on_device) + always_bytes
