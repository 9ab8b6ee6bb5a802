"""What memfit costs beside the kernels: an op outside the plan, a replayed op, a step with an empty plan.

    OMP_NUM_THREADS=1 python benchmarks/overhead.py [--out FILE]

Tiny tensors, so that kernels cost next to nothing; CPU seconds; the variants run in turn in one
process, and the median of the differences counts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from provenance import publish
from torch import Tensor, nn

from memfit.core.graph import ValueKey
from memfit.runtime.replay import Decisions, Replayer, decisions_of

OPS, REPEATS = 400, 41


class Chain(nn.Module):
    """Many small ops in one module call, each of which saves its output."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        """[8] -> [8]"""
        x = x * self.weight
        for _ in range(OPS):
            x = torch.tanh(x)
        return x


def seconds(run: Callable[[], object]) -> float:
    """CPU seconds of one call."""
    start_s = time.process_time()
    run()
    return time.process_time() - start_s


def forward(model: nn.Module, x: Tensor, decisions: Decisions | None) -> Tensor:
    """The forward, in the mode if there are decisions."""
    if decisions is None:
        return model(x).sum()  # type: ignore[no-any-return]
    with Replayer(model, decisions):
        return model(x).sum()  # type: ignore[no-any-return]


def measure() -> dict[str, Any]:
    """Microseconds an op, medians of paired differences."""
    model, x = Chain(), torch.randn(8)
    outside = decisions_of([ValueKey("model", "aten.exp.default", 0, 0)])  # a plan for an op that never comes
    every = decisions_of([ValueKey("model", "aten.tanh.default", i, 0) for i in range(OPS)])
    rows: dict[str, list[float]] = {"outside the plan": [], "replayed": []}
    for _ in range(REPEATS):
        plain_s = seconds(lambda: forward(model, x, None).backward())
        rows["outside the plan"].append(seconds(lambda: forward(model, x, outside).backward()) - plain_s)
        rows["replayed"].append(seconds(lambda: forward(model, x, every).backward()) - plain_s)
    return {
        name: {"us_per_op": statistics.median(values) / OPS * 1e6, "n": REPEATS}
        for name, values in rows.items()
    }


if __name__ == "__main__":
    publish(__doc__, measure)
