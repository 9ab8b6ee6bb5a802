"""Every operator of PyTorch, each sample of its own operator database, in a step that recomputes all it can.

    OMP_NUM_THREADS=1 python benchmarks/operator_database.py [--out FILE]

The judge is ``tests/operators.py``. Fails if anything differs from the plain step, or raises where that does
not.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

from provenance import publish

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from operators import judged, operators, samples_of

MOST_SAMPLES = 1000  # of an operator: all there are


def run() -> dict[str, Any]:
    """What became of all samples, and the reasons where one is not equal."""
    statuses: Counter[str] = Counter()
    recomputed: set[str] = set()
    equal: set[str] = set()
    reasons: list[dict[str, str]] = []
    for info in operators():
        for sample in samples_of(info, MOST_SAMPLES):
            found = judged(sample)
            statuses[found.status] += 1
            recomputed |= found.recomputed
            if found.status == "equal":
                equal.add(sample.operator)
            elif found.status != "no step":
                reasons.append({"sample": sample.name, "status": found.status, "reason": found.reason})
    return {
        "operators": len(equal),
        "samples": dict(statuses),
        "kinds_recomputed": len(recomputed),
        "reasons": reasons,
    }


if __name__ == "__main__":
    rows = publish(__doc__, run)
    broken = [row for row in rows["reasons"] if row["status"] in ("differs", "raises")]
    sys.exit(f"{len(broken)} samples broken" if broken else 0)
