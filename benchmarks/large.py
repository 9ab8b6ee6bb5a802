"""Time and memory to profile and plan a 32-layer Llama 7B at 4 x 2048 tokens, on fake tensors.

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
from memfit.runtime.fake import fake_tensors

ROWS, TOKENS = 4, 2048
GIB = 1 << 30


def measure() -> dict[str, Any]:
    """Wall and CPU seconds of the two stages, and the peak of real memory of this process."""
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    with fake_tensors():
        model = LlamaForCausalLM(LlamaConfig(use_cache=False)).to(torch.bfloat16).train()
        optimizer = torch.optim.AdamW(model.parameters())
        ids = torch.zeros(ROWS, TOKENS, dtype=torch.long)
        profile = memfit.profile(
            model,
            lambda m, batch: m(input_ids=batch, labels=batch).loss,
            ids,
            optimizer=optimizer,
            micro_batch_size=ROWS,
        )
    profiled_s, profiled_cpu_s = time.perf_counter() - start_s, time.process_time() - start_cpu_s
    plain = memfit.find_plan(profile, memory=1 << 50)
    activations = plain.predicted_peak_bytes - profile.residents.total_bytes
    rows = []
    for share in (0.6, 0.5, 0.4):
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        plan = memfit.find_plan(profile, memory=profile.residents.total_bytes + int(activations * share))
        rows.append(
            {
                "share_of_activations": share,
                "plan_s": time.perf_counter() - start_s,
                "plan_cpu_s": time.process_time() - start_cpu_s,
                "peak_gib": plan.predicted_peak_bytes / GIB,
                "recomputed_share_of_forward": plan.recompute_s / plan.forward_s,
                "extra_over_plain_step": plan.predicted_step_s / plain.predicted_step_s - 1,
                "gap_of_step": plan.optimality_gap,
            }
        )
    return {
        "profile_s": profiled_s,
        "profile_cpu_s": profiled_cpu_s,
        "plain_peak_gib": plain.predicted_peak_bytes / GIB,
        "plans": rows,
        "real_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB,
    }


if __name__ == "__main__":
    publish(__doc__, measure)
