"""Fake tensors on a CPU take the kernels of a GPU where that decides what is saved: attention.

On a CPU ``scaled_dot_product_attention`` with dropout falls back to plain arithmetic, which saves every
score. On CUDA it takes a fused kernel that saves none. Which one, and when, is as in
``aten/src/ATen/native/transformers/cuda/sdp_utils.cpp``: flash attention in half precision without a mask,
else the memory-efficient one, else plain arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_ATTENTION = torch.nn.functional.scaled_dot_product_attention
_HALVES = (torch.float16, torch.bfloat16)
_MOST_HEAD_SIZE = 256  # of flash attention
_ALIGNED = 8  # head sizes that no kernel has to pad


class CardKernels(TorchFunctionMode):
    """Within it, attention takes the kernel it would take on CUDA."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Exchanges attention, lets everything else pass."""
        kwargs = kwargs or {}
        found = _fused(*args, **kwargs) if func is _ATTENTION else None
        return func(*args, **kwargs) if found is None else found


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """The result of a fused kernel; None where CUDA has none for this call."""
    size = query.shape[-1]
    if query.dim() != 4 or size % _ALIGNED or value.shape[-1] != size:
        return None
    if query.dtype in _HALVES and attn_mask is None and size <= _MOST_HEAD_SIZE:
        out = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, scale=scale
        )
        return out[0]  # type: ignore[no-any-return]
    if enable_gqa and key.shape[1] != query.shape[1]:
        return None
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.where(attn_mask, 0.0, float("-inf")).to(query.dtype)
        attn_mask = attn_mask.expand(*query.shape[:2], query.shape[2], key.shape[2])
    needs_gradient = any(t.requires_grad for t in (query, key, value))
    out = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, needs_gradient, dropout_p, is_causal, scale=scale
    )
    return out[0]  # type: ignore[no-any-return]
