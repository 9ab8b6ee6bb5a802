"""Audits a loss of several terms: where no one count fits their sum, each term has one of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from memfit.core.audit import ROWS, Audit, Kind
from memfit.errors import UnsupportedModel
from memfit.runtime.arguments import check_type
from memfit.runtime.audit import LARGEST_COPY_BYTES, audit_job, cures
from memfit.runtime.job import Job, Optimizers
from memfit.runtime.micro import Loss, LossFn, whole_loss
from memfit.runtime.sharding import is_sharded


@dataclass(frozen=True, slots=True)
class _Spied:
    """A loss that notes the names of its terms, and which of them are in a graph."""

    loss_fn: LossFn
    terms: dict[str, bool] = field(default_factory=dict)

    def __call__(self, model: nn.Module, batch: Any) -> Loss:
        """The loss as it is."""
        loss = self.loss_fn(model, batch)
        if isinstance(loss, Mapping):
            for name, term in loss.items():
                self.terms[name] = self.terms.get(name, False) or _is_in_a_graph(term)
        return loss


@dataclass(frozen=True, slots=True)
class Term:
    """One term of a loss."""

    loss_fn: LossFn
    name: str

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """That term alone."""
        loss = self.loss_fn(model, batch)
        assert isinstance(loss, Mapping)
        return loss[self.name]


def audit(model: nn.Module, loss_fn: LossFn, batch: Any, *, optimizer: Optimizers = None) -> Audit:
    """Returns whether micro-batches give exactly the gradient of the whole batch, and under which weights.

    A copy of the model in float64 runs up to 6 rows of the batch, whole and in unequal parts. Nothing of the
    caller's changes: not the model, its gradients, buffers, modes and hooks, not the batch, the random
    streams or autocast.

    What it cannot see: a coupling that shows only in larger batches (experts that drop tokens when they are
    full), another path through the model for other data, what a loss writes outside of the model.

    Args:
        model: Any module, in the modes it trains in.
        loss_fn: ``loss_fn(model, batch) -> scalar tensor``, the loss of a whole batch, or a mapping of terms.
        batch: An example of the effective batch; its tensors share the first dimension.
        optimizer: Judged too, if given; a list of several, each.

    Raises:
        UnsupportedModel: The model or the batch is fake or on the meta device: there is nothing to compare.
        InexactAccumulation: The batch cannot be split by rows; the error names the leaf.
        TypeError, ValueError: The loss is not one number with a graph, nothing is trainable, or something
            is not as described above.
        Exception: What ``loss_fn`` raised, with a note of the rows that were probed.
    """
    check_type("model", model, nn.Module, "a torch.nn.Module")
    if is_sharded(model):
        raise UnsupportedModel(
            "the model is under fully_shard, so no rank has all of it to probe: audit it before fully_shard",
            owner=type(model).__name__,
        )
    return audit_terms(Job(model, whole_loss(loss_fn, None), batch, optimizer))


def audit_terms(
    job: Job, *, largest_copy_bytes: int = LARGEST_COPY_BYTES, judges_hooks: bool = True
) -> Audit:
    """The audit of a job; of each term of its loss where their sum has no count that fits.

    A term that no parameter leads to has no gradient, and one may not depend on the batch: weighted by rows.
    """

    def audited(loss_fn: LossFn) -> Audit:
        only = job._replace(loss_fn=loss_fn)
        return audit_job(only, largest_copy_bytes=largest_copy_bytes, judges_hooks=judges_hooks)

    spied = _Spied(job.loss_fn)
    whole = audited(spied)
    if whole.is_exact or len(spied.terms) < 2 or whole.kind not in _MAY_BE_TERMS:
        return whole
    found = tuple(
        (name, _by_rows_if_same(audited(Term(job.loss_fn, name))) if trains else _CONSTANT)
        for name, trains in spied.terms.items()
    )
    failed = next((audit for _, audit in found if not audit.is_exact), None)
    if failed is not None:
        name = next(name for name, audit in found if audit is failed)
        return _named(failed, name)
    worst_error = max((a.worst_error for _, a in found if not math.isnan(a.worst_error)), default=math.nan)
    return Audit(Kind.MIXED, None, worst_error, "loss_fn", terms=found)


_MAY_BE_TERMS = {Kind.UNITS, Kind.MIXED, Kind.STATISTIC, Kind.COUPLED_LOSS, Kind.UNDECIDED, Kind.SAME}
_CONSTANT = Audit(Kind.ROWS, ROWS, 0.0, "loss_fn", notes=("no parameter leads to it",))


def _by_rows_if_same(audit: Audit) -> Audit:
    """A term that is the same for every part (a penalty on parameters) may have any weights that sum to 1."""
    if audit.kind is not Kind.SAME:
        return audit
    return Audit(Kind.ROWS, ROWS, audit.worst_error, audit.owner, notes=("it is the same for every part",))


def _named(audit: Audit, term: str) -> Audit:
    """The audit of a term that hinders all, with its name."""
    owner = f"term {term!r}" if audit.owner == "loss_fn" else audit.owner
    return Audit(
        audit.kind, None, audit.worst_error, owner, cures(audit.kind), audit.undecided, notes=audit.notes
    )


def _is_in_a_graph(term: object) -> bool:
    """Whether a gradient can be taken of a term."""
    return isinstance(term, Tensor) and term.requires_grad
