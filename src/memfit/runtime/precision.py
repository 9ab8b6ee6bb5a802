"""Adds up the gradients of micro-batches in float32 where parameters are in reduced precision.

Note [Float32 sums]
 1. A sum in bfloat16 forgets what is small beside it: after 256 micro-batches it is 1.8 % off. So while the
    micro-batches of a step run, ``grad_dtype`` of such a parameter is float32: the engine casts what arrives,
    before it adds, and ``.grad`` is the sum in float32.
 2. After the last one each sum is rounded, once, to the type that the optimizer knows (torch's refuse mixed
    types), one parameter after the other, the smallest first: then rounding needs less than the last
    micro-batch did, which had a gradient and its cast beside all sums.
 3. A gradient that was there before is the start of the sum, and its tensor holds the end: it may be a view
    of a flat buffer. It stays in memory meanwhile; if the body raises, it is as it was.
 4. Who wants the sums themselves sets ``parameter.grad_dtype = torch.float32`` before ``fit``, as for a plain
    step. Such parameters are left alone here, and so is a single micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

SUM: torch.dtype = torch.float32


@contextmanager
def float32_sums(model: nn.Module) -> Iterator[None]:
    """The body's backwards add up in float32; afterwards ``.grad`` has the type it always has."""
    narrow = [p for p in model.parameters() if p.requires_grad and _is_narrow(p)]
    gradients = {p: p.grad for p in narrow}
    try:
        for p in narrow:
            former = p.grad
            set_gradient(p, None if former is None else former.to(SUM), SUM)
        yield
        for p in sorted(narrow, key=Tensor.numel):
            gradients[p] = _rounded(p, gradients[p])
            p.grad = None  # the sum goes before the next one is rounded
    finally:
        for p, gradient in gradients.items():
            set_gradient(p, gradient, p.dtype)


def set_gradient(parameter: Tensor, gradient: Tensor | None, dtype: torch.dtype | None) -> None:
    """Replaces ``.grad`` and the type it is kept in; torch refuses to change that while there is one."""
    parameter.grad = None
    parameter.grad_dtype = dtype
    parameter.grad = gradient


def empty_gradient(parameter: Tensor) -> Tensor:
    """A gradient as the backward leaves it and the optimizer finds it, without its numbers."""
    return torch.empty_like(parameter, dtype=parameter.grad_dtype)


def has_narrow(model: nn.Module) -> bool:
    """Whether gradients of a parameter are added up in another type than they are kept in."""
    return any(p.requires_grad and _is_narrow(p) for p in model.parameters())


def _is_narrow(parameter: Tensor) -> bool:
    """Whether gradients of a parameter are kept in less than float32, and nobody chose another type."""
    dtype = parameter.dtype
    return dtype.is_floating_point and dtype.itemsize < SUM.itemsize and parameter.grad_dtype == dtype


def _rounded(parameter: Tensor, former: Tensor | None) -> Tensor | None:
    """The sum in the parameter's type, in the tensor that was its gradient before, if there was one."""
    total = parameter.grad
    if total is None:
        return None
    if former is None or former.layout is not torch.strided or total.layout is not torch.strided:
        return total.to(parameter.dtype)
    with torch.no_grad():
        return former.copy_(total)
