"""DDP and FSDP2 on 2 and 4 processes against one with the whole batch: weights, and peaks of each rank.

    OMP_NUM_THREADS=1 python benchmarks/ranks.py [--out FILE]

Thirty steps of AdamW through ``memfit.fit`` on gloo processes that share the rows of each batch, in one or
three micro-batches, at a budget without limit, halfway to the least memory, and near that. The judge of the
weights is a plain loop on one process (relative error of the worst parameter), the judge of the peaks the
allocator: those of the first three steps, ``optimizer.step()`` included, the highest rank against the
prediction of all.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from provenance import publish

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import shards
from processes import on_ranks

PARTS_AND_SHARES = ((1, 0.5), (3, None), (3, 0.5), (3, 0.02))
STEPS = 30
MODELS = (("net", torch.float32), ("llama", torch.float64), ("gpt2", torch.float64))
Row = dict[str, Any]


def rows() -> Iterator[Row]:
    """One row for each engine, number of processes, model, number of micro-batches and budget."""
    for engine, ranks, (kind, dtype) in itertools.product(("DDP", "FSDP2"), (2, 4), MODELS):
        own = shards.ROWS // ranks
        cases = [
            shards.Case(-(-own // parts), share, dtype, kind, engine, STEPS)
            for parts, share in PARTS_AND_SHARES
        ]
        of_each = on_ranks("shards:each_case", ranks, cases, ranks=ranks, slowest_s=600)
        losses, weights = shards.alone(dtype, kind, STEPS)
        for case, *found in zip(cases, *of_each, strict=True):
            yield {
                "engine": engine,
                "ranks": ranks,
                "steps": STEPS,
                "model": kind,
                "dtype": str(dtype),
            } | _row(case, found, losses, weights)


def _row(
    case: shards.Case, found: list[shards.Trained], losses: list[float], weights: list[torch.Tensor]
) -> Row:
    """What the ranks of one case came to."""
    first, plan = found[0], found[0].plan
    errors = [
        float((one - other).norm() / other.norm())
        for trained in found
        for one, other in zip(trained.weights, weights, strict=True)
    ]
    apart = [abs(a - b) / b for trained in found for a, b in zip(trained.losses, losses, strict=True)]
    peaks = [(p, m) for t in found for p, m in zip(t.predicted_bytes, t.measured_bytes, strict=True)]
    measured_bytes = max(m for _, m in peaks)
    return {
        "micro_batches": plan.gradient_accumulation_steps,
        "budget": "no limit" if case.share is None else f"{case.share:.0%} of the way",
        "reduced": "once" if first.once else "each time",
        "recomputed_tensors": plan.recomputes,
        "weights_error": max(errors),
        "losses_error": max(apart),
        "predicted_bytes": plan.predicted_peak_bytes,
        "measured_bytes": measured_bytes,
        "predicted_over_measured": plan.predicted_peak_bytes / measured_bytes,
        "never_below": all(measured <= predicted for predicted, measured in peaks),
        "attempts": max(trained.attempts for trained in found),
    }


if __name__ == "__main__":
    publish(__doc__, lambda: [*rows()])
