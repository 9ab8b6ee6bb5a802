"""Exact accumulation for the heads of ``transformers``: every ``Auto`` class that builds tiny and offline.

    OMP_NUM_THREADS=1 python benchmarks/heads.py [--tasks causal masked] [--out FILE]

Each head of ``tests/heads.py`` runs through ``fit(count="auto")`` in float64: 7 rows of unlike lengths in
micro-batches of 2, 2, 2 and 1, attention masks, labels of -100 in unequal numbers, no dropout. Its gradient
is compared with that of one plain backward of the whole batch. Fails if an accepted one is off by more than
1e-10, or on an error that memfit does not raise by design. A head runs in a process of its own, for some take
hours at any size.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from provenance import provenance

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from heads import TASKS, Outcome, outcome

TOLERANCE, LIMIT_S = 1e-10, 20


def bounded(task: str, model_type: str) -> Outcome:
    """The outcome, if there is one in time."""
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=lambda: theirs.send(outcome(task, model_type)))
    process.start()
    theirs.close()
    try:
        return mine.recv() if mine.poll(LIMIT_S) else Outcome(False, reason=f"not done within {LIMIT_S} s")
    except EOFError:
        return Outcome(True, reason="the process ended", failed=True)
    finally:
        process.kill()
        process.join()


def is_kept(row: dict[str, Any]) -> bool:
    """Whether a head was refused by design, or its gradient is that of the whole batch."""
    return not row["failed"] and (row["relative_error"] is None or row["relative_error"] <= TOLERANCE)


def line(row: dict[str, Any]) -> str:
    """What became of a head."""
    name = f"{row['task']:24} {row['model']:28}"
    if row["relative_error"] is None:
        word = "BROKEN" if row["failed"] else "refused" if row["built"] else "not built"
        return f"{name} {word}: {row['reason'][:120]}"
    kept = "exact" if is_kept(row) else "BROKEN"
    return f"{name} {kept} by {row['counter']}, relative error {row['relative_error']:.1e}"


def summary(rows: list[dict[str, Any]]) -> str:
    """A line a task, and one over all."""
    lines = [f"{'':24} built  exact  refused  broken  worst error  counters"]
    for task in [*dict.fromkeys(row["task"] for row in rows), ""]:
        built = [row for row in rows if row["built"] and row["task"] in (task, task or row["task"])]
        ran = [row for row in built if row["relative_error"] is not None]
        refused = [row for row in built if row["relative_error"] is None and not row["failed"]]
        exact = sum(map(is_kept, ran))
        worst = max((row["relative_error"] for row in ran), default=0.0)
        counters = Counter(row["counter"] for row in ran)
        broken = len(built) - exact - len(refused)
        told = ", ".join(f"{name} {count}" for name, count in counters.most_common())
        lines.append(
            f"{task or 'all':24} {len(built):5} {exact:6} {len(refused):8} {broken:7} {worst:12.1e}  {told}"
        )
    return "\n".join(lines)


def main() -> None:
    """Prints a line a head and the summary; writes the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    made = provenance()
    outcome("sequence classification", "bert")  # loads what all need before the first process is made
    rows = []
    for task in options.tasks:
        for model_type in TASKS[task].models:
            rows.append({"task": task, "model": model_type, **asdict(bounded(task, model_type))})
            print(line(rows[-1]), flush=True)
            if options.out:
                options.out.write_text(json.dumps({"provenance": made, "rows": rows}, indent=1))
    print(summary(rows))
    broken = [row for row in rows if not is_kept(row)]
    sys.exit(f"{len(broken)} of {len(rows)} heads broken" if broken else 0)


if __name__ == "__main__":
    main()
