"""One micro-batch: the loss, checked and weighted. Recording and running share it, to the byte."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

LossFn = Callable[[nn.Module, Any], Tensor]


def weighted_loss(model: nn.Module, loss_fn: LossFn, part: Any, weight: float | None) -> Tensor:
    """The loss of one micro-batch times its weight in the effective batch; None: it is the whole batch.

    Raises:
        TypeError: ``loss_fn`` returned something else than a tensor.
        ValueError: The loss is not one number, or has no graph to go backward through.
    """
    torch.clear_autocast_cache()  # an autocast around the step would hold the casts of the last micro-batch
    loss = one_number(loss_fn(model, part))
    if not loss.requires_grad:
        raise ValueError(
            "the loss has no graph: no parameter that requires a gradient led to it. Do not call .detach(), "
            ".item() or torch.no_grad() in loss_fn, and train a model with requires_grad parameters"
        )
    loss = loss.reshape(())
    return loss if weight is None else loss * weight


def one_number(loss: object) -> Tensor:
    """The loss, if it is a tensor that holds one number.

    Raises:
        TypeError: It is something else than a tensor.
        ValueError: It holds more or fewer numbers.
    """
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"loss_fn returned a {type(loss).__name__}, not a tensor: return the scalar loss itself "
            "(for a transformers output, output.loss)"
        )
    if loss.numel() != 1 or loss.dim() > 1:
        raise ValueError(
            f"loss_fn returned a tensor of shape {tuple(loss.shape)}, not one number: reduce it with .mean() "
            "or .sum()"
        )
    return loss


def backward(loss: Tensor, scaler: torch.amp.GradScaler | None = None) -> None:
    """Goes backward, outside of any autocast: each op then runs in the type that its forward chose.

    Args:
        scaler: Its scale is the gradient to begin with, as after ``scaler.scale(loss).backward()``.
    """
    with _no_autocast():
        start = None if scaler is None else scaler.scale(torch.ones_like(loss)).to(loss.dtype)
        loss.backward(start)


@contextmanager
def _no_autocast() -> Iterator[None]:
    """Autocast around the caller is off in the body."""
    kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    for kind in kinds:
        torch.set_autocast_enabled(kind, False)
    try:
        yield
    finally:
        for kind in kinds:
            torch.set_autocast_enabled(kind, True)


def refuse_no_gradients() -> None:
    """Refuses a step where autograd is off.

    Raises:
        ValueError: Inside ``torch.no_grad()`` or ``torch.inference_mode()``.
    """
    for is_off, where in (
        (torch.is_inference_mode_enabled(), "torch.inference_mode()"),
        (not torch.is_grad_enabled(), "torch.no_grad()"),
    ):
        if is_off:
            raise ValueError(
                f"step was called inside {where}, which lets no gradient be made: call it outside"
            )
