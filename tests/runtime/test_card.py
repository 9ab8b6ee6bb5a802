"""Planning for a card takes its attention kernels, whatever the machine that plans."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import memfit
from memfit.runtime.fake import fake_tensors

HEADS, LENGTH, SIZE = 4, 64, 16
FLASH = "aten._scaled_dot_product_flash_attention.default"
EFFICIENT = "aten._scaled_dot_product_efficient_attention.default"


class Attention(nn.Module):
    """One attention with dropout."""

    def __init__(self, mask: str = "", size: int = SIZE) -> None:
        super().__init__()
        self.project = nn.Linear(HEADS * size, 3 * HEADS * size)
        self.mask, self.size = mask, size

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).view(x.shape[0], LENGTH, 3, HEADS, self.size).permute(2, 0, 3, 1, 4)
        mask: Tensor | None = None
        if self.mask:
            mask = torch.ones(x.shape[0], 1, LENGTH, LENGTH, dtype=torch.bool)
        if self.mask == "numbers":
            mask = torch.zeros(LENGTH, LENGTH, dtype=x.dtype)
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.1, is_causal=not self.mask)


def ops(dtype: torch.dtype, mask: str = "", *, device: str | None = "h100", size: int = SIZE) -> list[str]:
    """The ops of a forward and backward of it."""
    with fake_tensors():
        model = Attention(mask, size).to(dtype)
        batch = torch.zeros(8, LENGTH, HEADS * size, dtype=dtype)

        def loss(m: Any, b: Tensor) -> Tensor:
            out: Tensor = m(b).float().square().mean()
            return out

        profile = memfit.profile(model, loss, batch, micro_batch_size=8, device=device)
    return [op.key.op.split(" ")[0] for op in profile.graphs[0].ops]


@pytest.mark.parametrize(
    ("dtype", "mask", "kernel"),
    [
        (torch.bfloat16, "", FLASH),
        (torch.bfloat16, "truths", EFFICIENT),
        (torch.bfloat16, "numbers", EFFICIENT),
        (torch.float32, "", EFFICIENT),
    ],
)
def test_attention_takes_the_fused_kernel_of_the_card(dtype: torch.dtype, mask: str, kernel: str) -> None:
    found = ops(dtype, mask)
    assert kernel in found
    assert not any("softmax" in op for op in found)
    backward = kernel.replace("attention.default", "attention_backward.default")
    assert backward in found


def test_without_a_card_and_where_no_fused_kernel_fits_it_stays_as_it_is() -> None:
    assert FLASH not in ops(torch.bfloat16, device=None)
    assert any("softmax" in op for op in ops(torch.bfloat16, size=12))


def test_no_score_is_saved() -> None:
    """The scores take 8 x 4 x 64 x 64 x 2 bytes, and nothing of that size is made."""
    with fake_tensors():
        model = Attention().to(torch.bfloat16)
        batch = torch.zeros(8, LENGTH, HEADS * SIZE, dtype=torch.bfloat16)
        profile = memfit.profile(model, lambda m, b: m(b).float().mean(), batch, device="h100")
    (graph,) = (graph for graph in profile.graphs if graph.rows == 8)
    assert 8 * HEADS * LENGTH * LENGTH * 2 not in [storage.size_bytes for storage in graph.storages]


def test_a_mode_that_is_left_changes_nothing_any_more() -> None:
    ops(torch.bfloat16)
    query = torch.randn(1, 1, 4, 8, dtype=torch.bfloat16)
    assert torch.equal(
        scaled_dot_product_attention(query, query, query),
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, query, query)[0],
    )
