"""Predicted and measured peaks of real model families at five budgets each, beside the plain step.

    OMP_NUM_THREADS=1 python benchmarks/zoo.py [--scale 2] [--models gpt2 bert] [--out FILE]

The models of ``tests/models.py``, larger. Each is fitted whole, and where its loss allows in micro-batches,
at budgets from the least memory to no recomputation. Peaks are the CPU allocator's own. Fails if a measured
peak is above its budget or its prediction, or if anything differs from the plain step.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch
from provenance import provenance

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import memfit
from memfit.errors import InfeasibleBudget
from models import ZOO, ZooCase, budgets_of, judge

ROWS = 16


def rows_of(zoo: ZooCase, scale: int) -> Iterator[dict[str, Any]]:
    """One row a budget, whole and in micro-batches."""
    for micro_batch_size in (ROWS, 5) if zoo.count else (ROWS,):
        torch.manual_seed(4)
        model, batch = zoo.build(scale).train(), zoo.batch(ROWS, scale)
        profile = memfit.profile(model, zoo.loss, batch, micro_batch_size=micro_batch_size)
        for budget in budgets_of(profile):
            twin = copy.deepcopy(model)
            step = _fitted(zoo, twin, batch, budget, micro_batch_size)
            found = judge(zoo, twin, batch, step)
            yield {
                "model": zoo.name,
                "micro_batch_size": step.plan.micro_batch_size,
                "accumulation_steps": step.plan.gradient_accumulation_steps,
                **asdict(found),
                "ratio": found.predicted_bytes / found.measured_bytes,
                "bitwise": not found.differences,
                "recompute_share": step.plan.recompute_s / step.plan.forward_s,
            }


def _fitted(zoo: ZooCase, model: Any, batch: Any, budget: int, micro_batch_size: int) -> memfit.Step:
    """The step at a budget, or at the least memory that works if that is more."""
    count = zoo.count or "auto"
    try:
        return memfit.fit(
            model, zoo.loss, batch, memory=budget, micro_batch_size=micro_batch_size, count=count
        )
    except InfeasibleBudget as refused:
        return _fitted(zoo, model, batch, refused.needed_bytes, micro_batch_size)


def is_kept(row: dict[str, Any]) -> bool:
    """Whether a row keeps every promise but nearness."""
    within = row["measured_bytes"] <= row["predicted_bytes"] <= row["budget_bytes"]
    return bool(row["bitwise"] and within)


def main() -> None:
    """Prints a line a budget, the median and the worst ratio; writes the table."""
    default = Path(__file__).parent / "results" / f"{date.today()}_cpu_zoo.json"
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scale", type=int, default=2)
    parser.add_argument("--models", nargs="+", choices=list(ZOO), default=list(ZOO))
    parser.add_argument("--out", type=Path, default=default)
    options = parser.parse_args()
    rows = []
    for name in options.models:
        for row in rows_of(ZOO[name], options.scale):
            rows.append(row)
            print(
                f"{row['model']:10} {row['micro_batch_size']:3} rows  budget {row['budget_bytes']:12,}  "
                f"predicted {row['predicted_bytes']:12,}  measured {row['measured_bytes']:12,}  "
                f"ratio {row['ratio']:.5f}  recomputes {row['recompute_share']:6.1%}  "
                f"{'kept' if is_kept(row) else 'BROKEN'}",
                flush=True,
            )
    ratios = [row["ratio"] for row in rows]
    broken = [row for row in rows if not is_kept(row)]
    print(f"median {statistics.median(ratios):.5f}, worst {max(ratios):.5f}, lowest {min(ratios):.5f}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(
        json.dumps({"provenance": provenance(), "scale": options.scale, "rows": rows}, indent=1)
    )
    sys.exit(f"{len(broken)} of {len(rows)} rows broken" if broken else 0)


if __name__ == "__main__":
    main()
