"""Records a step at every micro-batch size: on fake tensors, or really at few rows. See Note [Profiling]."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from memfit.core.batching import balanced_parts
from memfit.core.costs import Measured, forward_bytes, scaled
from memfit.core.devices import Device, Roofline
from memfit.core.graph import Residents
from memfit.errors import MemfitError, UnsupportedModel
from memfit.runtime.batch import rows_of, tensors_of
from memfit.runtime.card import CardKernels
from memfit.runtime.compiled import compiled_regions
from memfit.runtime.fake import Faker, faked, is_fake, mode_for
from memfit.runtime.job import Job, first_rows, prepare_gradients, record_few, record_part
from memfit.runtime.meter import resident_sizes
from memfit.runtime.normalisation import normalised, pooled_tensors
from memfit.runtime.opaque import run_plainly
from memfit.runtime.precision import float32_sums
from memfit.runtime.preserve import contents_of
from memfit.runtime.probe import Probe, RooflineProbe, probe_for
from memfit.runtime.record import Recording, record
from memfit.runtime.rehearse import loss_between, outputs_of_all, refuse_other_shapes
from memfit.runtime.shadows import ShardedFaker
from memfit.runtime.update import Update, record_optimizer

_log = logging.getLogger("memfit")

_FEW_ROWS = 4
_USERS_FAULTS = (TypeError, ValueError, MemfitError)


class Sizes(NamedTuple):
    """A step at every micro-batch size; ``loss_of_all`` is what runs between two passes, if there are two."""

    recordings: list[Recording]
    residents: Residents
    update: Update
    loss_of_all: Recording | None
    by_fakes: bool


def record_sizes(job: Job, rows: int, counts: tuple[int, ...], card: Device | None) -> Sizes:
    """Every size on fake tensors, or really at few rows where fakes do not do."""
    if compiled_regions(job.model):  # their kernels are made for real tensors
        with contents_of(job.model):
            run_plainly(job, sorted({max(1, min(_FEW_ROWS, rows) // 2), min(_FEW_ROWS, rows)}))
            return record_really(job, rows, counts)
    try:
        with _quiet_fakes():
            return _record_fakes(job, rows, counts, card)
    except _USERS_FAULTS:
        raise
    except Exception as error:
        if "saved tensor hooks" in str(error):
            raise UnsupportedModel(
                "the loss uses torch.func (grad, jacrev, ...), which does not allow the saved-tensor hooks "
                "that memfit works with: use torch.autograd.grad instead",
                owner="loss_fn",
            ) from error
        if any(is_fake(p) for p in job.model.parameters()):
            raise UnsupportedModel(
                f"the model cannot be planned without its data ({type(error).__name__}: {error}); build it "
                "for real and profile that",
                owner=type(job.model).__name__,
            ) from error
        if job.sharding is not None:
            raise UnsupportedModel(
                f"the model cannot be planned on fake tensors ({type(error).__name__}: {error}), and under "
                "fully_shard no rank has all of it to run: make the forward read no data (.item(), .all() of "
                "a mask), or use DistributedDataParallel",
                owner=type(job.model).__name__,
            ) from error
        _log.info("fake tensors do not do here (%s: %s); recording really", type(error).__name__, error)
        with contents_of(job.model):
            return record_really(job, rows, counts)


def _record_fakes(job: Job, rows: int, counts: tuple[int, ...], card: Device | None) -> Sizes:
    """Records every size at once, without memory."""
    device = Roofline() if card is None else card.roofline
    faker = faker_for(job)
    # Under a fake mode of the caller everything is fake already.
    with faked(job.model, faker), _entered(faker):
        batch = faker.batch(job.batch)
        with nullcontext() if card is None else CardKernels():
            recordings = _record_counts(job, batch, rows, counts, device)
            between = _record_between(job, batch, batch, RooflineProbe(device), recordings)
        return _sizes(recordings, between, _resident_and_update(job, batch, faker, card), by_fakes=True)


def faker_for(job: Job) -> Faker:
    """What makes fakes of a job's tensors: whole ones of sharded parameters."""
    faker = Faker(mode_for(job.model))
    return faker if job.sharding is None else ShardedFaker(faker.mode, job.sharding)


class _Between(NamedTuple):
    """What runs between two passes, and the bytes that are held through the second one."""

    loss_of_all: Recording
    held_bytes: int


def _record_between(
    job: Job, batch: Any, known: Any, probe: Probe, recordings: Iterable[Recording]
) -> _Between | None:
    """Records the loss of all outputs, if there are two passes in one of the recordings.

    Args:
        known: The batch or some of its rows, from whose outputs those of all are made up.

    Raises:
        InexactAccumulation: The outputs of micro-batches cannot be joined.
    """
    if not job.is_two_pass or not any(run.graph.gradients_resident for run in recordings):
        return None
    with normalised(job.model, job.batch_norm, several=False):
        return _recorded_between(job, batch, known, probe)


def _recorded_between(job: Job, batch: Any, known: Any, probe: Probe) -> _Between:
    """The same, where there are two passes and BatchNorm does what it will do in them."""
    there = rows_of(known)
    fewer = max(there // 2, min(there - 1, 2))  # not one row, which BatchNorm cannot train on
    like = outputs_of_all(job.model, job.loss_fn, known, rows_of(batch))
    refuse_other_shapes(like, outputs_of_all(job.model, job.loss_fn, first_rows(known, there, fewer), fewer))
    held_bytes = sum(t.nbytes for _, t in tensors_of(like)) + sum(b.nbytes for b in job.model.buffers())
    prepare_gradients(job.model, resident=False)
    externals = [*job.model.parameters(), *job.model.buffers(), *(t for _, t in tensors_of(batch))]
    forward = loss_between(job.model, job.loss_fn, batch, like)
    del like
    run = record(job.model, forward, externals, probe, rows=rows_of(batch), gradients_resident=False)
    return _Between(run, held_bytes)


def _sizes(
    recordings: list[Recording], between: _Between | None, others: tuple[Residents, Update], *, by_fakes: bool
) -> Sizes:
    """The recordings; those of a second pass know what is held beside them."""
    if between is None:
        return Sizes(recordings, *others, None, by_fakes)
    held = [
        run._replace(graph=replace(run.graph, held_bytes=between.held_bytes))
        if run.graph.gradients_resident
        else run
        for run in recordings
    ]
    return Sizes(held, *others, between.loss_of_all, by_fakes)


def _record_counts(
    job: Job, batch: Any, rows: int, counts: tuple[int, ...], device: Roofline
) -> list[Recording]:
    """Records three sizes; the others lie on the line through two of them, if those did the same."""

    def recorded(count: int) -> Recording:
        prepare_gradients(job.model, resident=count > 1)
        return record_part(job, batch, rows, count, RooflineProbe(device), resident=count > 1)

    found = {count: recorded(count) for count in counts if count == 1}
    if found and found[1].graph.coupled:
        return [found[1]]  # a layer that mixes rows must see them all, so no other size is worth a look
    several = sorted(
        (count for count in counts if count > 1), key=lambda count: -balanced_parts(rows, count)[0]
    )
    ends: list[Recording] = []
    for count in several:
        size = balanced_parts(rows, count)[0]
        # One row is a size of its own: what is expanded or contiguous differs there.
        if len(ends) == 2 and size > 1 and ends[1].graph.log == ends[0].graph.log:
            large, small = ends
            found[count] = large._replace(graph=scaled(small.graph, large.graph, size))
            continue
        try:
            found[count] = recorded(count)
            ends = [*ends, found[count]][:2]
        except ValueError as error:
            if not found:
                raise
            _log.info("no micro-batch of %d rows: %s", size, error)
    return [found[count] for count in counts if count in found]


def record_really(job: Job, rows: int, counts: tuple[int, ...]) -> Sizes:
    """Records a few real rows where fakes cannot; the optimizer still runs on fakes."""
    recordings = record_scaled(job, rows, counts)
    between = _record_between_really(job, recordings)
    return _sizes(recordings, between, residents_of(job), by_fakes=False)


def record_loss_of_all(job: Job, recordings: Iterable[Recording]) -> Recording | None:
    """Records the loss of all outputs really, on made-up ones; None where there are no two passes."""
    between = _record_between_really(job, recordings)
    return None if between is None else between.loss_of_all


def _record_between_really(job: Job, recordings: Iterable[Recording]) -> _Between | None:
    """Records what runs between two passes really."""
    place, rows = next(job.model.parameters()).device, rows_of(job.batch)
    known = first_rows(job.batch, rows, min(_FEW_ROWS, rows))
    between = _record_between(job, job.batch, known, probe_for(place)(), recordings)
    prepare_gradients(job.model, resident=False)
    return between


def residents_of(job: Job) -> tuple[Residents, Update]:
    """What is alive throughout, and what the optimizer takes, on fakes and without running the model."""
    faker = faker_for(job)
    with faked(job.model, faker), _entered(faker):
        return _resident_and_update(job, faker.batch(job.batch), faker, None)


def _resident_and_update(job: Job, batch: Any, faker: Faker, card: Device | None) -> tuple[Residents, Update]:
    """What is alive throughout, and what the optimizer takes, with fakes in the model."""
    device = Roofline() if card is None else card.roofline
    prepare_gradients(job.model, resident=True)
    update = Update()
    if job.optimizer is not None:
        make = faker.piece if isinstance(faker, ShardedFaker) else faker
        update = record_optimizer(job.optimizer, make, device, for_cuda=card is not None)
    residents = _residents(job, batch, update)
    if job.sharding is not None:
        residents = job.sharding.residents(residents, job.held_sizes)
    return residents, update


def record_scaled(job: Job, rows: int, counts: tuple[int, ...]) -> list[Recording]:
    """Records really at two numbers of rows and carries the bytes over to every size.

    A model that runs with the rows it is written for only (a queue of them, edges of one graph) is recorded
    whole. One row is a size of its own, so it is recorded too where it is wanted: other ops may run there,
    and then nothing says which bytes grow with the rows.
    """
    few = min(_FEW_ROWS, rows)
    try:
        return _record_scaled(job, rows, counts, (max(1, few // 2), few))
    except _USERS_FAULTS:
        raise
    except Exception as error:
        if 1 not in counts or few == rows:
            raise
        _log.info("no micro-batch of few rows (%s: %s)", type(error).__name__, error)
        return _record_scaled(job, rows, (1,), (rows, rows))


def _record_scaled(job: Job, rows: int, counts: tuple[int, ...], sizes: tuple[int, int]) -> list[Recording]:
    """The same from a smaller and a larger size."""
    place = next(job.model.parameters()).device
    recorded: dict[tuple[int, bool], Recording] = {}
    wanted = [balanced_parts(rows, count)[0] for count in counts]
    for size in sorted({*sizes} | ({1} & {*wanted})):
        part = first_rows(job.batch, rows, size)
        for resident in {count > 1 for count in counts}:
            prepare_gradients(job.model, resident=resident)
            probe = probe_for(place)()
            recorded[size, resident] = record_part(job, part, size, 1, probe, resident=resident)
    prepare_gradients(job.model, resident=False)
    found = []
    for count, rows_of_part in zip(counts, wanted, strict=True):
        small, large = (recorded[size, count > 1] for size in sizes)
        own = recorded.get((rows_of_part, count > 1))
        found.append(own or large._replace(graph=scaled(small.graph, large.graph, rows_of_part)))
        if found[-1].graph.coupled and count == 1:
            break
    return found


def fakes_agree(job: Job, point: Measured) -> bool:
    """Whether fakes do what a measured run really did: the same ops, making as many bytes.

    They do not where a model reads its data, or where an op's fake has no workspace (MKL-DNN's LSTM).
    """
    faker = Faker(mode_for(job.model))
    with faked(job.model, faker), _entered(faker):
        fake = job._replace(batch=faker.batch(job.batch))
        try:
            graph = record_few(fake, point.rows, lambda: RooflineProbe(Roofline())).graph
        except Exception as error:  # a micro-batch of several may do what the whole batch does not
            _log.info("fake tensors do not do the whole batch (%s: %s)", type(error).__name__, error)
            return False
    return forward_bytes(graph) == point.made_bytes


def _residents(job: Job, batch: Any, update: Update) -> Residents:
    """What is alive throughout; gradients as they are now."""
    gradients = [p.grad for p in job.model.parameters() if p.grad is not None]
    place = next(job.model.parameters()).device
    parameter_sizes = resident_sizes([*job.model.parameters(), *job.model.buffers()]) + job.held_sizes
    gradient_sizes = resident_sizes(gradients)
    summed_sizes = _summed_sizes(job)
    if job.owns_gradients:  # they are in what is held, once micro-batches have been added up
        gradient_sizes = ()
    inputs = [t for _, t in tensors_of(batch) if t.device == place]
    batch_sizes = resident_sizes(inputs) + tuple(t.nbytes for t in inputs if t.requires_grad)  # and .grad
    return Residents(
        parameters_bytes=sum(parameter_sizes),
        gradients_bytes=sum(gradient_sizes),
        optimizer_bytes=update.state_bytes,
        batch_bytes=sum(batch_sizes),
        parameter_sizes=parameter_sizes,
        gradient_sizes=gradient_sizes,
        batch_sizes=batch_sizes,
        summed_bytes=None if summed_sizes == gradient_sizes else sum(summed_sizes),
        summed_sizes=() if summed_sizes == gradient_sizes else summed_sizes,
    )


def _summed_sizes(job: Job) -> tuple[int, ...]:
    """The blocks that gradients are in while micro-batches are added up, and pooled statistics."""
    with float32_sums(job.model):
        gradients = [p.grad for p in job.model.parameters() if p.grad is not None]
        pools = pooled_tensors(job.model) if job.batch_norm == "ghost" else []
        return resident_sizes([*gradients, *pools])


@contextmanager
def _quiet_fakes() -> Iterator[None]:
    """What fakes cannot do is an answer here, not an error to log."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _entered(faker: Faker) -> Iterator[None]:
    """The fake mode, unless the caller is in it."""
    active = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    if active is faker.mode:
        yield
    else:
        with faker.mode:
            yield
