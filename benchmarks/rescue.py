"""Trainings that run out of memory at random moments, compared to the bit with those that do not.

    OMP_NUM_THREADS=1 python benchmarks/rescue.py [--trainings 100] [--out FILE]

The errors are those that users report, raised at a random op of forward, backward or the copies before a
step, or in a replay; each training has one or two. The models are those of ``tests/outages.py``. Then some
trainings run under a hard cap on the process, which is lowered while they run. Fails if a loss, a
parameter, a buffer, a momentum or the random stream differs, or if an outage was not survived.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from provenance import provenance

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from outages import CAPS, Job, capped, differing, disturbed, undisturbed

STEPS = 6


def injected(name: str, trainings: int) -> dict[str, Any]:
    """Trainings of one job with errors raised on purpose."""
    job = Job.named(name)
    expected, ops = undisturbed(job, STEPS)
    state, places, wrong = expected.state(), Counter[str](), list[str]()
    for seed in range(trainings):
        training, struck = disturbed(job, STEPS, ops, random.Random(seed))
        places.update(struck)
        if training.losses != expected.losses or len(training.step.rescues) != len(struck):
            wrong.append(f"training {seed}: losses, or an outage that was not survived")
        wrong += [f"training {seed}: {what}" for what in differing(training.state(), state)]
    row = {"job": name, "trainings": trainings, "steps": trainings * STEPS, "outages": places.total()}
    return row | {"where": dict(sorted(places.items())), "differences": wrong}


def under_caps() -> dict[str, Any]:
    """Trainings under a hard cap, each beside a plain one."""
    found = {str(cap): capped(cap) for cap in CAPS}
    wrong = [f"cap {cap}" for cap, run in found.items() if run["end"] != run["plain"]]
    wrong += [f"cap {cap}: no outage" for cap, run in found.items() if not run["rescues"]]
    attempts = {cap: run["rescues"] for cap, run in found.items()}
    return {"job": "hard cap", "trainings": len(CAPS), "attempts": attempts, "differences": wrong}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trainings", type=int, default=100)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    logging.getLogger("memfit").setLevel(logging.ERROR)
    rows = [injected(name, options.trainings // 2) for name in ("whole", "in parts")]
    rows.append(under_caps())
    print(json.dumps(rows, indent=1))
    if options.out:
        options.out.write_text(json.dumps({"provenance": provenance(), "rows": rows}, indent=1))
    if any(row["differences"] for row in rows):
        raise SystemExit("a training with an outage differs from the one without")


if __name__ == "__main__":
    main()
