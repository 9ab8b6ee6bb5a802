"""DDP and FSDP2 on 2 and 4 processes against one with the whole batch: weights, and peaks of each rank.

    OMP_NUM_THREADS=1 python benchmarks/ranks.py [--out FILE]

Thirty steps of AdamW through ``memfit.fit`` on gloo processes that share the rows of each batch: whole, at a
budget halfway to the least memory, and in three micro-batches, without limit and near the least. One group of
processes for each number of ranks runs all of its cases, both groups side by side. The judge of the
weights is a plain loop on one process (relative error of the worst parameter), the judge of the peaks the
allocator: those of the first three steps, ``optimizer.step()`` included, the highest rank against the
prediction of all.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from provenance import publish

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import shards
from processes import on_ranks

PARTS_AND_SHARES = ((1, 0.5), (3, None), (3, 0.02))
RANKS, ENGINES, STEPS = (2, 4), ("DDP", "FSDP2"), 30
MODELS = (("net", torch.float32), ("llama", torch.float64), ("gpt2", torch.float64))
SLOWEST_S = 3600.0
Row = dict[str, Any]


def rows() -> Iterator[Row]:
    """One row for each number of processes, engine, model, number of micro-batches and budget."""
    alone = {kind: shards.alone(dtype, kind, STEPS) for kind, dtype in MODELS}
    with ThreadPoolExecutor() as pool:
        of_each = [*pool.map(_on_ranks, RANKS)]
    for ranks, found in zip(RANKS, of_each, strict=True):
        for case, *trained in zip(_cases(ranks), *found, strict=True):
            told = {"engine": case.engine, "ranks": ranks, "steps": STEPS, "model": case.kind}
            yield told | {"dtype": str(case.dtype)} | _row(case, trained, *alone[case.kind])


def _on_ranks(ranks: int) -> list[list[shards.Trained]]:
    """All cases, as each rank ran them."""
    return on_ranks("shards:each_case", ranks, _cases(ranks), ranks=ranks, slowest_s=SLOWEST_S)


def _cases(ranks: int) -> list[shards.Case]:
    """What so many ranks run."""
    ways = itertools.product(ENGINES, MODELS, PARTS_AND_SHARES)
    return [
        shards.Case(-(-shards.ROWS // ranks // parts), share, dtype, kind, engine, STEPS)
        for engine, (kind, dtype), (parts, share) in ways
    ]


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
