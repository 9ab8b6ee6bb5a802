"""What is profiled: a model with its loss and batch, and one recorded micro-batch of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from memfit.core.batching import balanced_parts
from memfit.errors import UnsupportedModel
from memfit.runtime.batch import split, tensors_of
from memfit.runtime.micro import LossFn, micro_batches, weighted_loss
from memfit.runtime.normalisation import is_pooled
from memfit.runtime.precision import empty_gradient
from memfit.runtime.probe import Probe
from memfit.runtime.record import Recording, record


class Job(NamedTuple):
    """A model with its loss and batch: what is profiled."""

    model: nn.Module
    loss_fn: LossFn
    batch: Any
    optimizer: torch.optim.Optimizer | None
    batch_norm: str = "exact"


def check_model(model: nn.Module) -> torch.device:
    """The device the model trains on.

    Raises:
        ValueError: Nothing is trainable.
        UnsupportedModel: Its parameters are on several devices, or one has a hook that would step
            the optimizer inside the backward.
    """
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trained:
        raise ValueError(
            f"{type(model).__name__} has no parameter that requires a gradient, so there is nothing to "
            "train: call requires_grad_() on what is to be trained"
        )
    for name, parameter in trained:
        if parameter._post_accumulate_grad_hooks:
            raise UnsupportedModel(
                f"'{name}' has a hook that runs whenever its gradient has been accumulated (an optimizer "
                "fused into the backward?), which would see every micro-batch: remove it, and step the "
                "optimizer after step(batch)",
                owner=name,
            )
    places = {p.device: name for name, p in model.named_parameters()}
    if len(places) > 1:
        (one, first), (other, second), *_ = places.items()
        raise UnsupportedModel(
            f"'{first}' is on {one} and '{second}' on {other}: memfit plans one device. Move the model with "
            "model.to(device)",
            owner=second,
        )
    return next(iter(places))


def record_part(
    job: Job, batch: Any, rows: int, count: int, probe: Probe, *, resident: bool, hold_saved: bool = False
) -> Recording:
    """Records the largest micro-batch of ``count``."""
    sizes = balanced_parts(rows, count)
    part = split(batch, sizes)[0]
    weight = None if count == 1 else sizes[0] / rows
    with micro_batches(job.model, job.batch_norm, several=resident):
        gradients = [p.grad for p in job.model.parameters() if p.grad is not None]
        externals = [
            *job.model.parameters(),
            *job.model.buffers(),
            *gradients,
            *(t for _, t in tensors_of(batch)),
        ]
        recording = record(
            job.model,
            lambda: weighted_loss(job.model, job.loss_fn, part, weight),
            externals,
            probe,
            rows=sizes[0],
            gradients_resident=resident,
            hold_saved=hold_saved,
        )
    if job.batch_norm != "ghost":
        return recording
    coupled = tuple(op for op in recording.graph.coupled if not is_pooled(job.model, op))
    return recording._replace(graph=replace(recording.graph, coupled=coupled))


def prepare_gradients(model: nn.Module, *, resident: bool) -> None:
    """Gives the parameters gradients, or takes them away."""
    for parameter in model.parameters():
        parameter.grad = empty_gradient(parameter) if resident and parameter.requires_grad else None


def first_rows(batch: Any, rows: int, few: int) -> Any:
    """The first rows of a batch."""
    return split(batch, (few, rows - few))[0] if few < rows else batch


def optimizer_state(optimizer: torch.optim.Optimizer | None) -> list[Tensor]:
    """The tensors an optimizer holds by now."""
    if optimizer is None:
        return []
    values = [value for state in optimizer.state.values() for value in state.values()]
    return [value for value in values if isinstance(value, Tensor)]
