"""Proves that two passes are exact: a row's outputs must not depend on the rows beside it.

A sum of any fixed function over the rows of the outputs adds up over micro-batches if, and but for freak
coincidences only if, each row's outputs are its own. So the audit of such a sum, of a function that is not
linear and weighs every number differently, is the proof; and it finds all that forbids accumulation besides
the loss: layers that mix rows, state, random numbers that rows share, hooks, optimizers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from memfit.core.audit import Audit, Kind
from memfit.core.basis import what_changed
from memfit.core.graph import Profile
from memfit.errors import InexactAccumulation, UnsupportedModel
from memfit.runtime.basis import basis_of
from memfit.runtime.batch import rows_of, tensors_of
from memfit.runtime.count import COUPLED
from memfit.runtime.job import Job
from memfit.runtime.micro import OutputsFn, OutputsLoss
from memfit.runtime.normalisation import by_rows
from memfit.runtime.passes import is_differentiable
from memfit.runtime.rehearse import refuse_no_rows
from memfit.runtime.rescue import is_out_of_memory
from memfit.runtime.terms import audit_terms

_log = logging.getLogger("memfit")


@dataclass(frozen=True, slots=True)
class SumOverRows:
    """A loss that is a sum over the rows of a model's outputs, whatever they are."""

    outputs_fn: OutputsFn

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """One number."""
        outputs = self.outputs_fn(model, batch)
        refuse_no_rows(outputs, rows_of(batch))
        found = [t for _, t in tensors_of(outputs) if is_differentiable(t)]
        if not found:
            raise NoOutputs(
                f"outputs_fn returned a {type(outputs).__name__} without any tensor that a gradient can be "
                "taken of: return tensors of floating point, of one row a row of the batch"
            )
        terms = [_generic(tensor, number) for number, tensor in enumerate(found)]
        return sum(terms[1:], terms[0])


class NoOutputs(ValueError):
    """Nothing that ``outputs_fn`` returns can have a gradient."""


class Passes(NamedTuple):
    """Whether several micro-batches run in two passes, and the audit that says so, if one was made."""

    job: Job
    audit: Audit | None = None


def in_two_passes(job: Job, count: object, stored: Profile | None, *, largest_copy_bytes: int) -> Passes:
    """The job, to be run in two passes where its loss is given apart from the outputs and does not add up.

    Args:
        count: As :func:`memfit.fit` has it: ``"coupled"`` asks for two passes, ``"auto"`` where they are
            needed and exact. What cannot be audited is not split.
        stored: A profile of the same job says it without an audit.

    Raises:
        ValueError: Two passes are asked for, and the outputs are not given apart; or none has a gradient.
        InexactAccumulation: Two passes are asked for, and are not exact, or outputs have no rows.
    """
    if job.sharding is not None and isinstance(job.loss_fn, OutputsLoss):
        raise UnsupportedModel(
            "outputs_fn= is not known under fully_shard, where no rank has all of the model: give "
            "loss_fn(model, batch) and count=, or use DistributedDataParallel",
            owner="outputs_fn",
        )
    if not isinstance(job.loss_fn, OutputsLoss):
        if count == COUPLED:
            raise ValueError("count='coupled' needs outputs_fn=: the loss is taken on all outputs")
        return Passes(job)
    if count not in ("auto", COUPLED) or rows_of(job.batch) < 2:
        return Passes(job)
    twice = job._replace(is_two_pass=True)
    if stored is not None and count == "auto":
        for known in (twice, job):
            if what_changed(stored.basis, basis_of(known)) is None:
                return Passes(known, stored.audit)
    audited = partial(audit_terms, largest_copy_bytes=largest_copy_bytes, judges_hooks=False)
    rows = job._replace(loss_fn=SumOverRows(job.loss_fn.outputs_fn))
    try:
        with by_rows(job.model, job.batch_norm):
            whole = _exact(job, audited) if count == "auto" else None
            if whole is not None:
                return Passes(job, whole)
            found = audited(rows)
    except Exception as error:
        if count == COUPLED or isinstance(error, NoOutputs) or is_out_of_memory(error):
            raise
        _log.info("two passes cannot be proved (%s: %s)", type(error).__name__, error)
        return Passes(job)
    if found.is_exact and found.kind is Kind.SUM:
        return Passes(twice, found)
    if count == COUPLED:
        raise InexactAccumulation(f"two passes are not exact: {found}", owner=found.owner)
    return Passes(job)


def _exact(job: Job, audited: Callable[[Job], Audit]) -> Audit | None:
    """The audit of a loss whose parts can be weighted; None of others, and where it fails on a few rows."""
    try:
        found = audited(job)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return None
    return found if found.is_exact else None


def _generic(outputs: Tensor, number: int) -> Tensor:
    """A sum over rows in which every number of a row counts, each in its own way, and not linearly."""
    outputs = torch.view_as_real(outputs) if outputs.is_complex() else outputs
    rows = outputs.reshape(len(outputs), -1)
    angles = torch.arange(rows.shape[1], dtype=rows.dtype, device=rows.device) * 0.7 + number + 1
    return (rows * angles.cos() + rows.square() * angles.sin()).sum()
