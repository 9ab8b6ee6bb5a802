"""The proof on a GPU: GPT-2 medium in bf16 autocast at four enforced budgets, beside plain and checkpointing.

    python benchmarks/check_cuda.py [--rows 16] [--tokens 1024] [--out FILE]

Each budget is enforced by ``torch.cuda.set_per_process_memory_fraction``, which caps what the allocator
reserves: the budget plus a stated allowance for its segments. What the allocator requested, allocated and
reserved in the measured steps stands beside what was predicted of it. Step times are
medians of steps run in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from provenance import provenance
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel

import memfit
from memfit.core.reserved import predict_cuda_memory

SHARES = (0.8, 0.6, 0.45, 0.3)  # of the plain activations
ALLOWANCE = 1.05  # reserved over allocated, plus ALLOWANCE_BYTES: segments are rounded up
ALLOWANCE_BYTES = 256 << 20
STEPS = 5


def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The model's own loss under bf16 autocast."""
    with torch.autocast("cuda", torch.bfloat16):
        loss: Tensor = model(**batch).loss
    return loss


def make(tokens: int) -> nn.Module:
    """GPT-2 medium with random weights."""
    config = GPT2Config(n_embd=1024, n_layer=24, n_head=16, n_positions=max(1024, tokens), use_cache=False)
    return GPT2LMHeadModel(config).cuda().train()


def timed(step: Callable[[], Any], optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Median seconds of a whole step, its peak, and the allocator's retries."""
    seconds = []
    torch.cuda.reset_peak_memory_stats()
    retries = torch.cuda.memory_stats()["num_alloc_retries"]
    for _ in range(STEPS):
        torch.cuda.synchronize()
        start_s = time.perf_counter()
        step()
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start_s)
    return {
        "step_s": statistics.median(seconds),
        "measured_bytes": torch.cuda.max_memory_allocated(),
        "requested_bytes": torch.cuda.memory_stats()["requested_bytes.all.peak"],
        "reserved_bytes": torch.cuda.max_memory_reserved(),
        "retries": torch.cuda.memory_stats()["num_alloc_retries"] - retries,
    }


def plain(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], Any]:
    """The ordinary step."""
    return lambda: loss_fn(model, batch).backward()


def checkpointed(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], Any]:
    """The ordinary step with every block under torch.utils.checkpoint."""

    def run() -> None:
        blocks = list(model.transformer.h)  # type: ignore[union-attr, arg-type]
        for block in blocks:
            block.forward = _wrapped(block.forward)
        try:
            loss_fn(model, batch).backward()
        finally:
            for block in blocks:
                del block.__dict__["forward"]

    return run


def _wrapped(forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)


def cap(budget_bytes: int | None) -> int:
    """Caps what may be reserved; returns the cap."""
    total = torch.cuda.get_device_properties(0).total_memory
    limit = total if budget_bytes is None else min(total, int(budget_bytes * ALLOWANCE) + ALLOWANCE_BYTES)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(limit / total)
    return limit


def has_expandable_segments() -> bool:
    """Whether the environment asks the allocator for them, under its new or its old name."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    return any("expandable_segments:True" in os.environ.get(name, "") for name in names)


def at_budget(
    model: nn.Module, batch: dict[str, Tensor], optimizer: torch.optim.Optimizer, budget_bytes: int
) -> dict[str, Any]:
    """memfit at one enforced budget."""
    limit = cap(budget_bytes)
    start_s = time.perf_counter()
    step = memfit.fit(model, loss_fn, batch, memory=budget_bytes, optimizer=optimizer, count="shifted_labels")
    fit_s = time.perf_counter() - start_s
    step(batch)
    optimizer.step()
    optimizer.zero_grad()
    found = timed(lambda: step(batch), optimizer)
    plan = step.plan
    predicted = predict_cuda_memory(step.profile, plan, expandable_segments=has_expandable_segments())
    return found | {
        "what": "memfit",
        "budget_bytes": budget_bytes,
        "cap_bytes": limit,
        "predicted_bytes": plan.predicted_peak_bytes,
        "predicted_requested_bytes": predicted.requested_bytes,
        "predicted_allocated_bytes": predicted.allocated_bytes,
        "predicted_reserved_bytes": predicted.reserved_bytes,
        "micro_batch_size": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "recomputed_share_of_forward": plan.recompute_s / plan.forward_s,
        "fit_s": fit_s,
        "held": found["measured_bytes"] <= budget_bytes and found["retries"] == 0,
    }


def measure(rows: int, tokens: int) -> list[dict[str, Any]]:
    """Plain, checkpointed, and memfit at each budget."""
    torch.manual_seed(0)
    model = make(tokens)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    ids = torch.randint(0, 50257, (rows, tokens), device="cuda")
    batch = {"input_ids": ids, "labels": ids}
    cap(None)
    found = []
    for name, run in (
        ("plain", plain(model, batch)),
        ("every block checkpointed", checkpointed(model, batch)),
    ):
        timed(run, optimizer)
        found.append(timed(run, optimizer) | {"what": name})
        print(json.dumps(found[-1]), flush=True)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    fixed = 4 * size  # parameters, gradients, two states
    for share in SHARES:
        budget_bytes = fixed + int((found[0]["measured_bytes"] - fixed) * share)
        found.append(at_budget(model, batch, optimizer, budget_bytes))
        print(json.dumps(found[-1]), flush=True)
    return found


def main() -> None:
    """Prints one JSON line a row; writes them with their provenance if asked; fails if a budget broke."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--out")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: nothing was checked")
    rows = measure(options.rows, options.tokens)
    if options.out:
        with open(options.out, "w", encoding="utf-8") as file:
            json.dump({"provenance": provenance(), "rows": rows}, file, indent=1)
    if not all(row.get("held", True) for row in rows):
        raise SystemExit("a budget was broken")


if __name__ == "__main__":
    main()
