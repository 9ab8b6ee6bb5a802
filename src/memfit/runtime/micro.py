"""One micro-batch: the loss, checked and weighted. Recording and running share it, to the byte."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from memfit.runtime.normalisation import normalised
from memfit.runtime.precision import SUM, float32_sums

LossFn = Callable[[nn.Module, Any], Tensor]


@contextmanager
def micro_batches(model: nn.Module, batch_norm: str, *, several: bool) -> Iterator[Callable[[], None]]:
    """What holds while the micro-batches of one step run; call what it gives before each of them.

    Args:
        batch_norm: ``"exact"``, ``"ghost"`` or ``"frozen"``, see ``runtime/normalisation.py``.
        several: There are two or more, so gradients are added up (``runtime/precision.py``).
    """
    sums = float32_sums(model) if several else nullcontext()
    with normalised(model, batch_norm, several=several) as begin, sums:
        yield begin


def weighted_loss(model: nn.Module, loss_fn: LossFn, part: Any, weight: float | None) -> Tensor:
    """The loss of one micro-batch times its weight in the effective batch; None: it is the whole batch.

    One in reduced precision is weighted, and so added up, in float32.

    Raises:
        TypeError: ``loss_fn`` returned something else than a tensor.
        ValueError: The loss is not one number, or has no graph to go backward through.
    """
    loss = one_number(loss_fn(model, part))
    if not loss.requires_grad:
        raise ValueError(
            "the loss has no graph: no parameter that requires a gradient led to it. Do not call .detach(), "
            ".item() or torch.no_grad() in loss_fn, and train a model with requires_grad parameters"
        )
    loss = loss.reshape(())
    if weight is None:
        return loss
    return loss.to(torch.promote_types(loss.dtype, SUM)) * weight


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
