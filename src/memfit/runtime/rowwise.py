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

from memfit.core.audit import Audit, Kind
from memfit.runtime.audit import audit_job
from memfit.runtime.batch import rows_of, tensors_of
from memfit.runtime.job import Job
from memfit.runtime.micro import OutputsFn, OutputsLoss
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
        terms = [_generic(tensor, number) for number, tensor in enumerate(found)]
        return sum(terms[1:], terms[0])


def audit_of_rows(job: Job) -> Audit:
    """The audit of what every row's outputs are made of; exact by "sum" where two passes are exact."""
    assert isinstance(job.loss_fn, OutputsLoss)
    return audit_job(job._replace(loss_fn=SumOverRows(job.loss_fn.outputs_fn)))


def are_independent(audit: Audit) -> bool:
    """Whether :func:`audit_of_rows` has proved that two passes are exact."""
    return audit.is_exact and audit.kind is Kind.SUM


def _generic(outputs: Tensor, number: int) -> Tensor:
    """A sum over rows in which every number of a row counts, each in its own way, and not linearly."""
    outputs = torch.view_as_real(outputs) if outputs.is_complex() else outputs
    rows = outputs.reshape(len(outputs), -1)
    angles = torch.arange(rows.shape[1], dtype=rows.dtype, device=rows.device) * 0.7 + number + 1
    return (rows * angles.cos() + rows.square() * angles.sin()).sum()
