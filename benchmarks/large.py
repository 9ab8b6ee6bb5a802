"""Large models on fake tensors for an H100: time to profile and plan, what plans cost, the least memory.

    OMP_NUM_THREADS=1 python benchmarks/large.py [--out FILE]

GPT-2 of 12 and 24 layers, Llama 7B and 70B, ResNet-50. Seconds of their steps are those of the roofline in
``core/devices.py``; seconds of profiling and planning are measured.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from provenance import publish
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
)

import memfit
from memfit.core.graph import Profile
from memfit.core.strategies import strategies
from memfit.core.timeline import base_bytes
from memfit.runtime.fake import fake_tensors

GIB = 1 << 30
PLENTY = 1 << 50
SHARES = (0.6, 0.5, 0.4)
LLAMA_70B: dict[str, Any] = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}


class Job(NamedTuple):
    """A model, a batch of so many rows, and a loss."""

    model: nn.Module
    batch: Tensor
    loss_fn: Callable[[nn.Module, Any], Tensor]


def gpt2(layers: int, rows: int = 8) -> Job:
    """GPT-2 at the width of its medium size, with its dropout."""
    config = GPT2Config(n_layer=layers, n_embd=1024, n_head=16, use_cache=False)
    return Job(GPT2LMHeadModel(config), torch.zeros(rows, 1024, dtype=torch.long), next_tokens)


def llama(rows: int = 4, **sizes: Any) -> Job:
    """Llama 7B, or of other sizes."""
    model = LlamaForCausalLM(LlamaConfig(use_cache=False, **sizes))
    return Job(model, torch.zeros(rows, 2048, dtype=torch.long), next_tokens)


def resnet50() -> Job:
    """ResNet-50 on 128 images."""
    config = ResNetConfig()
    config.num_labels = 1000
    return Job(ResNetForImageClassification(config), torch.zeros(128, 3, 224, 224), classes)


def next_tokens(model: nn.Module, batch: Tensor) -> Tensor:
    """The loss of a language model."""
    loss: Tensor = model(input_ids=batch, labels=batch).loss
    return loss


def classes(model: nn.Module, batch: Tensor) -> Tensor:
    """The loss of a classifier."""
    labels = torch.zeros(len(batch), dtype=torch.long)
    loss: Tensor = model(pixel_values=batch, labels=labels).loss
    return loss


def profiled(make: Callable[[], Job], dtype: torch.dtype, micro_batch_size: int | None = None) -> Profile:
    """The profile of a job for an H100, with a fused AdamW: its step holds nothing beside its state."""
    with fake_tensors():
        job = make()
        model = job.model.to(dtype).train()
        batch = job.batch.to(dtype) if job.batch.is_floating_point() else job.batch
        return memfit.profile(
            model,
            job.loss_fn,
            batch,
            optimizer=torch.optim.AdamW(model.parameters(), fused=True),
            micro_batch_size=micro_batch_size or len(batch),
            device="h100",
        )


def plan_rows(profile: Profile, **names: str) -> list[dict[str, Any]]:
    """What plans at shares of the plain activations cost, and what finding them took."""
    plain = memfit.find_plan(profile, memory=PLENTY)
    activations = plain.predicted_peak_bytes - profile.residents.total_bytes
    rows = []
    for share in SHARES:
        budget = profile.residents.total_bytes + int(activations * share)
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        try:
            plan = memfit.find_plan(profile, memory=budget)
        except memfit.InfeasibleBudget:  # the loss alone takes more
            continue
        rows.append(
            {
                **names,
                "share_of_activations": share,
                "plan_s": time.perf_counter() - start_s,
                "plan_cpu_s": time.process_time() - start_cpu_s,
                "peak_gib": plan.predicted_peak_bytes / GIB,
                "recomputed_share_of_forward": plan.recompute_s / plan.forward_s,
                "extra_over_plain_step": plan.predicted_step_s / plain.predicted_step_s - 1,
                "gap_of_step": plan.optimality_gap,
            }
        )
    return rows


def least_over_blocks(profile: Profile) -> float:
    """Least activation bytes over those of every block under ``torch.utils.checkpoint``, both simulated.

    Beside activations there are, in each of several micro-batches, gradients summed in float32.
    """
    every = next(s for s in strategies(profile) if s.family == "every block")
    always_bytes = base_bytes(profile, profile.graphs[0])
    blocks_bytes = every.predicted_peak_bytes - always_bytes
    try:
        memfit.find_plan(profile, memory=1)
    except memfit.InfeasibleBudget as refused:
        return (refused.needed_bytes - always_bytes) / blocks_bytes
    raise AssertionError("one byte was enough")


def measure() -> dict[str, Any]:
    """Everything, the 7B first: what it takes of real memory is the peak of the process so far."""
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    seven = profiled(llama, torch.bfloat16)
    profiled_s, profiled_cpu_s = time.perf_counter() - start_s, time.process_time() - start_cpu_s
    plans = plan_rows(seven, model="Llama 7B", dtype="bfloat16")
    real_memory_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
    for name, make in (("Llama 7B", llama), ("GPT-2 24 layers", lambda: gpt2(24)), ("ResNet-50", resnet50)):
        for dtype in (torch.bfloat16, torch.float32):
            if (name, dtype) != ("Llama 7B", torch.bfloat16):
                kind = str(dtype).removeprefix("torch.")
                plans += plan_rows(profiled(make, dtype), model=name, dtype=kind)
    twelve = profiled(lambda: gpt2(12), torch.bfloat16)
    start_s = time.perf_counter()
    points = len(memfit.frontier(twelve))
    return {
        "profile_7b_s": profiled_s,
        "profile_7b_cpu_s": profiled_cpu_s,
        "real_memory_gib": real_memory_gib,
        "plans": plans,
        "frontier_12_s": time.perf_counter() - start_s,
        "frontier_12_points": points,
        "plans_12": plan_rows(twelve, model="GPT-2 12 layers", dtype="bfloat16"),
        "plans_70b": plan_rows(
            profiled(lambda: llama(**LLAMA_70B), torch.bfloat16), model="Llama 70B", dtype="bfloat16"
        ),
        "least_over_blocks": least_over_blocks(profiled(lambda: llama(8), torch.bfloat16, 4)),
    }


if __name__ == "__main__":
    publish(__doc__, measure)
