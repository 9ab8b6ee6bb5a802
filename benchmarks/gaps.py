"""Certified gaps, breaches of "more memory is never slower", and time to plan, over models and budgets.

    OMP_NUM_THREADS=1 python benchmarks/gaps.py [--out FILE]

Models are traced on fake tensors and their seconds are a roofline, so the plans do not depend on the
machine; only the CPU seconds do. Budgets lie at equal ratios of the memory above the residents, from the
least that works to no recomputation.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from provenance import publish
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import memfit
from memfit.core.graph import Profile
from memfit.core.plan import Plan, Planner
from memfit.runtime.fake import fake_tensors

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from models import UNet

BUDGETS = 24


def _language_loss(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=batch, labels=batch).loss
    return loss


def _square_loss(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = model(batch).square().mean()
    return loss


def _gpt2(layers: int, **sizes: Any) -> Profile:
    return _profiled(
        lambda: GPT2LMHeadModel(GPT2Config(n_layer=layers, **sizes)),
        lambda: torch.zeros(8, 1024 if not sizes else 128, dtype=torch.long),
        _language_loss,
    )


NARROW: dict[str, Any] = {"n_embd": 256, "n_head": 8, "vocab_size": 512}
MODELS: dict[str, Callable[[], Profile]] = {
    "gpt2, 12 layers, with its cache": lambda: _gpt2(12),
    "gpt2, 12 narrow layers, with its cache": lambda: _gpt2(12, **NARROW),
    "gpt2, 32 narrow layers, with its cache": lambda: _gpt2(32, **NARROW),
    "llama 7b": lambda: _profiled(
        lambda: LlamaForCausalLM(LlamaConfig(use_cache=False)).to(torch.bfloat16),
        lambda: torch.zeros(4, 2048, dtype=torch.long),
        _language_loss,
    ),
    "u-net": lambda: _profiled(UNet, lambda: torch.zeros(8, 3, 128, 128), _square_loss),
}


def _profiled(build: Callable[[], nn.Module], batch: Callable[[], Tensor], loss: Any) -> Profile:
    with fake_tensors():
        model, rows = build().train(), batch()
        optimizer = torch.optim.AdamW(model.parameters())
        return memfit.profile(model, loss, rows, optimizer=optimizer, micro_batch_size=len(rows))


def measure() -> list[dict[str, Any]]:
    """One row a model."""
    return [{"model": name, **row(make())} for name, make in MODELS.items()]


def row(profile: Profile) -> dict[str, Any]:
    """All budgets of one model."""
    start_s = time.process_time()
    planner = Planner(profile)
    low, high = planner.lowest().predicted_peak_bytes, memfit.find_plan(profile, memory=1 << 60)
    base = profile.residents.total_bytes
    ratio = (high.predicted_peak_bytes - base) / (low - base)
    budgets = [base + round((low - base) * ratio ** (i / (BUDGETS - 1))) for i in range(BUDGETS)]
    plans = [planner.fastest(budget) or planner.least(budget) for budget in budgets]
    all_s = time.process_time() - start_s
    start_s = time.process_time()
    memfit.find_plan(profile, memory=budgets[BUDGETS // 2])
    return {
        "budgets": BUDGETS,
        "gaps_of_step": [plan.optimality_gap for plan in plans],
        "worst_gap_of_step": max(plan.optimality_gap for plan in plans),
        "gaps_above_half_a_percent": sum(plan.optimality_gap > 0.005 for plan in plans),
        "slower_with_more_memory": _breaches(plans, lambda less, more: more - less, "predicted_step_s"),
        "higher_with_less_memory": _breaches(plans, lambda less, more: less - more, "predicted_peak_bytes"),
        "all_budgets_cpu_s": all_s,
        "one_budget_cpu_s": time.process_time() - start_s,
    }


def _breaches(plans: list[Plan], excess: Callable[[float, float], float], name: str) -> int:
    values = [getattr(plan, name) for plan in plans]
    return sum(excess(less, more) > 0 for less, more in pairwise(values))


if __name__ == "__main__":
    publish(__doc__, measure)
