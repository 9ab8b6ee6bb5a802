"""A 7B Llama from its transformers config, to be planned without a GPU and without 7B weights:

memfit plan examples/llama7b.py:workload --memory 80GiB
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from memfit.workload import Workload

LENGTH = 2048  # tokens of a row


def loss_fn(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Returns the mean cross-entropy of the next token."""
    output: Any = model(input_ids=batch["tokens"], labels=batch["tokens"], use_cache=False)
    loss: torch.Tensor = output.loss
    return loss


def workload(batch_size: int = 4, seed: int = 0, device: str = "cpu") -> Workload:
    """Returns one training job: Llama 2 7B in bfloat16, AdamW, rows of 2,048 tokens."""
    torch.manual_seed(seed)
    config = LlamaConfig()  # its defaults are Llama 2 7B
    with torch.device(device):
        model: torch.nn.Module = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16)

    def batch(index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed + index)
        tokens = torch.randint(config.vocab_size, (batch_size, LENGTH), generator=generator)
        return {"tokens": tokens.to(device)}

    return Workload(model, torch.optim.AdamW(model.parameters(), lr=1e-5), loss_fn, batch)
