"""Predicted against measured peak of whole training steps, over families of ``transformers`` at five budgets.

    OMP_NUM_THREADS=1 python benchmarks/families.py [--models gpt2 bert] [--out FILE]

The models of ``tests/families.py``, each fitted with AdamW, whole and where its loss allows in
micro-batches, at budgets from the least memory to no recomputation. Measured is the first step with
``optimizer.step()``, in which the optimizer's state is born, and the second, which finds it there. Peaks are
the CPU allocator's own. Fails if a peak is above its prediction, or its budget, or if anything differs from
the plain step.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from provenance import provenance

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import memfit
from families import FAMILIES, Family, fitted, judged_steps, own_loss
from models import budgets_of

ROWS, FEW_ROWS, BUDGETS = 8, 3, 5


def rows_of(family: Family) -> Iterator[dict[str, Any]]:
    """One row a budget, whole and in micro-batches."""
    for size in (ROWS, FEW_ROWS) if family.count else (ROWS,):
        torch.manual_seed(4)
        model, batch = family.build(), family.batch(ROWS)
        optimizer = torch.optim.AdamW(model.parameters())
        profile = memfit.profile(model, own_loss, batch, optimizer=optimizer, micro_batch_size=size)
        for budget in budgets_of(profile, BUDGETS):
            own = copy.deepcopy(model)
            step, optimizer = fitted(family, own, batch, budget, size)
            first, second = judged_steps(family, own, batch, step, optimizer)
            yield {
                "model": family.name,
                "kind": family.kind,
                "source": step.profile.source,
                "micro_batch_size": step.plan.micro_batch_size,
                "accumulation_steps": step.plan.gradient_accumulation_steps,
                "budget_bytes": step.plan.budget_bytes,
                "first_predicted_bytes": first.predicted_bytes,
                "first_measured_bytes": first.measured_bytes,
                "second_predicted_bytes": second.predicted_bytes,
                "second_measured_bytes": second.measured_bytes,
                "first_ratio": first.ratio,
                "second_ratio": second.ratio,
                "differences": [*first.differences, *second.differences],
                "recompute_share": step.plan.recompute_s / step.plan.forward_s,
            }


def is_kept(row: dict[str, Any]) -> bool:
    """Whether a row keeps every promise but nearness."""
    steps = ("first", "second")
    within = all(
        row[f"{s}_measured_bytes"] <= row[f"{s}_predicted_bytes"] <= row["budget_bytes"] for s in steps
    )
    return within and not row["differences"]


def summary(rows: list[dict[str, Any]]) -> str:
    """A line a family, and one over all."""
    lines = [f"{'':14} {'cases':>5}  first: median   worst  lowest  second: median   worst  lowest"]
    for name in [*dict.fromkeys(row["model"] for row in rows), ""]:
        mine = [row for row in rows if row["model"] == name or not name]
        line = f"{name or 'all':14} {len(mine):5}"
        for which in ("first", "second"):
            ratios = [row[f"{which}_ratio"] for row in mine]
            line += f"        {statistics.median(ratios):.5f} {max(ratios):.5f} {min(ratios):.5f}"
        lines.append(f"{line}{'' if all(map(is_kept, mine)) else '  BROKEN'}")
    return "\n".join(lines)


def main() -> None:
    """Prints a line a budget and the summary; writes the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    for name in options.models:
        for row in rows_of(FAMILIES[name]):
            rows.append(row)
            print(
                f"{row['model']:12} {row['micro_batch_size']:2} rows  budget {row['budget_bytes']:11,}  "
                f"first {row['first_measured_bytes']:11,} x {row['first_ratio']:.5f}  "
                f"second {row['second_measured_bytes']:11,} x {row['second_ratio']:.5f}  "
                f"recomputes {row['recompute_share']:6.1%}  {'kept' if is_kept(row) else 'BROKEN'}",
                flush=True,
            )
    print(summary(rows))
    if options.out:
        options.out.write_text(json.dumps({"provenance": provenance(), "rows": rows}, indent=1))
    broken = [row for row in rows if not is_kept(row)]
    sys.exit(f"{len(broken)} of {len(rows)} rows broken" if broken else 0)


if __name__ == "__main__":
    main()
