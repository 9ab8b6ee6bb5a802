"""Proves that two passes are exact: a row's outputs must not depend on the rows beside it.

A sum of any fixed function over the rows of the outputs adds up over micro-batches if, and but for freak
coincidences only if, each row's outputs are its own. So the audit of such a sum, of a function that is not
linear and weighs every number differently, is the proof; and it finds all that forbids accumulation besides
the loss: layers that mix rows, state, random numbers that rows share, hooks, optimizers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from memfit.core.audit import Kind
from memfit.errors import InexactAccumulation
from memfit.runtime.audit import audit_job
from memfit.runtime.batch import rows_of, tensors_of
from memfit.runtime.job import Job
from memfit.runtime.micro import OutputsFn, OutputsLoss
from memfit.runtime.normalisation import by_rows
from memfit.runtime.passes import is_differentiable
from memfit.runtime.rehearse import refuse_no_rows


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
            raise ValueError(
                f"outputs_fn returned a {type(outputs).__name__} without any tensor that a gradient can be "
                "taken of: return tensors of floating point, of one row a row of the batch"
            )
        terms = [_generic(tensor, number) for number, tensor in enumerate(found)]
        return sum(terms[1:], terms[0])


def in_two_passes(job: Job, count: object) -> Job:
    """The job, to be run in two passes where its loss is given apart from the outputs and does not add up.

    Args:
        count: As :func:`memfit.fit` has it: ``"coupled"`` asks for two passes, ``"auto"`` where they are
            needed and exact.

    Raises:
        ValueError: Two passes are asked for, and the outputs are not given apart.
        InexactAccumulation: Two passes are asked for, and are not exact, or outputs have no rows.
    """
    if not isinstance(job.loss_fn, OutputsLoss):
        if count == "coupled":
            raise ValueError("count='coupled' needs outputs_fn=: the loss is taken on all outputs")
        return job
    if count not in ("auto", "coupled") or rows_of(job.batch) < 2:
        return job
    with by_rows(job.model, job.batch_norm):
        if count == "auto" and audit_job(job).is_exact:
            return job
        audited = audit_job(job._replace(loss_fn=SumOverRows(job.loss_fn.outputs_fn)))
    if audited.is_exact and audited.kind is Kind.SUM:
        return job._replace(is_two_pass=True)
    if count == "coupled":
        raise InexactAccumulation(f"two passes are not exact: {audited}", owner=audited.owner)
    return job


def _generic(outputs: Tensor, number: int) -> Tensor:
    """A sum over rows in which every number of a row counts, each in its own way, and not linearly."""
    outputs = torch.view_as_real(outputs) if outputs.is_complex() else outputs
    rows = outputs.reshape(len(outputs), -1)
    angles = torch.arange(rows.shape[1], dtype=rows.dtype, device=rows.device) * 0.7 + number + 1
    return (rows * angles.cos() + rows.square() * angles.sin()).sum()
