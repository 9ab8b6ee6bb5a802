"""What is profiled: a model with its loss and batch, and one recorded micro-batch of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from memfit.core.batching import balanced_parts
from memfit.core.graph import without_gradients
from memfit.errors import UnsupportedModel
from memfit.runtime.arguments import check_type
from memfit.runtime.batch import rows_of, split, tensors_of
from memfit.runtime.hooks import refuse_accumulation_hooks
from memfit.runtime.micro import LossFn, micro_batches, weighted_loss
from memfit.runtime.normalisation import is_pooled
from memfit.runtime.precision import empty_gradient
from memfit.runtime.probe import Probe
from memfit.runtime.record import Differentiable, Recording, record
from memfit.runtime.rehearse import second_pass
from memfit.runtime.shadows import shadowed
from memfit.runtime.sharding import Sharding

Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None


class Job(NamedTuple):
    """A model with its loss and batch: what is profiled. Several optimizers step one after the other.

    ``is_two_pass``: several micro-batches run in two passes; then the loss is an :class:`OutputsLoss`.
    ``held_sizes``: Bytes of blocks that are there throughout beside the parameters (DDP's buckets); with
    ``owns_gradients`` the gradients lie in them in the end.
    ``sharding``: how FSDP holds the model, see ``runtime/sharding.py``.
    """

    model: nn.Module
    loss_fn: LossFn
    batch: Any
    optimizer: Optimizers
    batch_norm: str = "exact"
    is_two_pass: bool = False
    held_sizes: tuple[int, ...] = ()
    owns_gradients: bool = False
    sharding: Sharding | None = None


def check_model(model: nn.Module) -> torch.device:
    """The device the model trains on.

    Raises:
        TypeError: It is no module.
        ValueError: Nothing is trainable, or autograd is off for good.
        UnsupportedModel: Its parameters are on several devices, one has a hook that would step the
            optimizer inside the backward, or a part is scripted.
    """
    check_type("model", model, nn.Module, "a torch.nn.Module")
    if torch.is_inference_mode_enabled():
        raise ValueError("memfit was called inside torch.inference_mode(): call it outside, to train")
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trained:
        raise ValueError(
            f"{type(model).__name__} has no parameter that requires a gradient, so there is nothing to "
            "train: call requires_grad_() on what is to be trained"
        )
    _refuse_scripts(model)
    for name, parameter in trained:
        refuse_accumulation_hooks(name, parameter)
    places = {p.device: name for name, p in model.named_parameters()}
    if len(places) > 1:
        (one, first), (other, second), *_ = places.items()
        raise UnsupportedModel(
            f"'{first}' is on {one} and '{second}' on {other}: memfit plans one device. Move the model with "
            "model.to(device)",
            owner=second,
        )
    return next(iter(places))


def _refuse_scripts(model: nn.Module) -> None:
    """Raises for a part that TorchScript compiled: it optimises its ops anew from step to step."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedModel(
                f"'{name or 'model'}' is a ScriptModule: TorchScript changes its ops from step to step, and "
                "its parameters are no attributes of a Python module. Give memfit the module before "
                "torch.jit.script or torch.jit.trace",
                owner=name or "model",
            )


def record_part(
    job: Job, batch: Any, rows: int, count: int, probe: Probe, *, resident: bool, hold_saved: bool = False
) -> Recording:
    """Records the largest micro-batch of ``count``."""
    sizes = balanced_parts(rows, count)
    part = split(batch, sizes)[0]
    weight = None if count == 1 else sizes[0] / rows

    def forward() -> Differentiable:
        return weighted_loss(job.model, job.loss_fn, part, weight)

    with (
        micro_batches(job.model, job.batch_norm, several=resident),
        shadowed(job.sharding, resident=resident),
    ):
        gradients = [p.grad for p in job.model.parameters() if p.grad is not None]
        if job.is_two_pass and resident:
            forward, seeds = second_pass(job.model, job.loss_fn, part)
            gradients += seeds
        externals = [
            *job.model.parameters(),
            *job.model.buffers(),
            *gradients,
            *(t for _, t in tensors_of(batch)),
        ]
        recording = record(
            job.model,
            forward,
            externals,
            probe,
            rows=sizes[0],
            gradients_resident=resident,
            hold_saved=hold_saved,
        )
    if job.owns_gradients and not resident:
        recording = recording._replace(graph=without_gradients(recording.graph))
    if job.batch_norm != "ghost":
        return recording
    coupled = tuple(op for op in recording.graph.coupled if not is_pooled(job.model, op))
    return recording._replace(graph=replace(recording.graph, coupled=coupled))


def record_few(job: Job, few: int, probe: Callable[[], Probe], *, hold_saved: bool = False) -> Recording:
    """Records a step of few rows alone, from no gradients.

    A loss in two passes may take all rows or none. Then it is left out: the second pass is run, of few rows.
    """
    total = rows_of(job.batch)
    part = first_rows(job.batch, total, few)
    prepare_gradients(job.model, resident=False)
    try:
        small = job._replace(batch=part)
        return record_part(small, part, few, 1, probe(), resident=False, hold_saved=hold_saved)
    except (RuntimeError, ValueError):
        if not job.is_two_pass or few == total:
            raise
    count = -(-total // few)
    prepare_gradients(job.model, resident=True)
    return record_part(job, job.batch, total, count, probe(), resident=True, hold_saved=hold_saved)


def prepare_gradients(model: nn.Module, *, resident: bool) -> None:
    """Gives the parameters gradients, or takes them away."""
    for parameter in model.parameters():
        parameter.grad = empty_gradient(parameter) if resident and parameter.requires_grad else None


def first_rows(batch: Any, rows: int, few: int) -> Any:
    """The first rows of a batch."""
    return split(batch, (few, rows - few))[0] if few < rows else batch


def each_optimizer(optimizer: Optimizers) -> tuple[torch.optim.Optimizer, ...]:
    """The optimizers, however many were given; Accelerate's wrapper is taken off.

    Raises:
        TypeError: Something else was given.
    """
    if optimizer is None:
        return ()
    found = tuple(optimizer) if isinstance(optimizer, Sequence) else (optimizer,)
    for one in found:
        if not isinstance(one, torch.optim.Optimizer):
            raise TypeError(
                f"optimizer is a {type(one).__name__}: give a torch.optim.Optimizer, or a list of several"
            )
    return tuple(map(_unwrapped, found))


def _unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """What really steps: Accelerate's wrapper has no state of its own, and leaves steps out now and then."""
    inner = getattr(optimizer, "optimizer", None)
    is_wrapper = type(optimizer).__name__ == "AcceleratedOptimizer"
    return inner if is_wrapper and isinstance(inner, torch.optim.Optimizer) else optimizer


def optimizer_state(optimizer: Optimizers) -> list[Tensor]:
    """The tensors that optimizers hold by now."""
    states = [state for one in each_optimizer(optimizer) for state in one.state.values()]
    return [tensor for state in states for value in state.values() for tensor in _tensors_in(value)]


def _tensors_in(value: Any) -> list[Tensor]:
    """The tensors of an entry of a state: LBFGS has lists of them."""
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in _tensors_in(item)]
    return [value] if isinstance(value, Tensor) else []
