"""Time and memory to profile and plan Llama 7B and 70B on fake tensors, and the least memory of the 7B.

OMP_NUM_THREADS=1 python benchmarks/large.py [--out FILE]
"""

from __future__ import annotations

import resource
import time
from typing import Any

import torch
from provenance import publish
from transformers import LlamaConfig, LlamaForCausalLM

import memfit
from memfit.core.graph import Profile
from memfit.core.strategies import strategies
from memfit.runtime.fake import fake_tensors

ROWS, TOKENS = 4, 2048
GIB = 1 << 30
LLAMA_7B: dict[str, Any] = {}
LLAMA_70B: dict[str, Any] = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}


def measure() -> dict[str, Any]:
    """Wall and CPU seconds of the stages, and the peak of real memory of this process."""
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    profile = profiled(LLAMA_7B, ROWS)
    profiled_s, profiled_cpu_s = time.perf_counter() - start_s, time.process_time() - start_cpu_s
    plain = memfit.find_plan(profile, memory=1 << 50)
    plans = [plan_row(profile, share) for share in (0.6, 0.5, 0.4)]
    real_memory_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
    return {
        "profile_s": profiled_s,
        "profile_cpu_s": profiled_cpu_s,
        "plain_peak_gib": plain.predicted_peak_bytes / GIB,
        "plans": plans,
        "real_memory_gib": real_memory_gib,
        "least_over_blocks": least_over_blocks(profiled(LLAMA_7B, 2 * ROWS)),
        "plans_70b": [plan_row(profiled(LLAMA_70B, ROWS), share) for share in (0.6, 0.4)],
    }


def profiled(sizes: dict[str, Any], rows: int) -> Profile:
    """A Llama in bfloat16 with AdamW, in micro-batches of ROWS."""
    with fake_tensors():
        model = LlamaForCausalLM(LlamaConfig(use_cache=False, **sizes)).to(torch.bfloat16).train()
        return memfit.profile(
            model,
            lambda m, batch: m(input_ids=batch, labels=batch).loss,
            torch.zeros(rows, TOKENS, dtype=torch.long),
            optimizer=torch.optim.AdamW(model.parameters()),
            micro_batch_size=ROWS,
        )


def plan_row(profile: Profile, share: float) -> dict[str, Any]:
    """One budget: what its plan costs, and what finding it took."""
    plain = memfit.find_plan(profile, memory=1 << 50)
    activations = plain.predicted_peak_bytes - profile.residents.total_bytes
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    plan = memfit.find_plan(profile, memory=profile.residents.total_bytes + int(activations * share))
    return {
        "share_of_activations": share,
        "plan_s": time.perf_counter() - start_s,
        "plan_cpu_s": time.process_time() - start_cpu_s,
        "peak_gib": plan.predicted_peak_bytes / GIB,
        "recomputed_share_of_forward": plan.recompute_s / plan.forward_s,
        "extra_over_plain_step": plan.predicted_step_s / plain.predicted_step_s - 1,
        "gap_of_step": plan.optimality_gap,
    }


def least_over_blocks(profile: Profile) -> float:
    """Least activation bytes over those of every block under ``torch.utils.checkpoint``, both simulated."""
    every = next(s for s in strategies(profile) if s.family == "every block")
    blocks_bytes = every.predicted_peak_bytes - profile.residents.total_bytes
    try:
        memfit.find_plan(profile, memory=1)
    except memfit.InfeasibleBudget as refused:
        return (refused.needed_bytes - profile.residents.total_bytes) / blocks_bytes
    raise AssertionError("one byte was enough")


if __name__ == "__main__":
    publish(__doc__, measure)
