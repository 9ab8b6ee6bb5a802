"""What recomputing costs beside the kernels: with memfit, with `torch.utils.checkpoint`, and selectively.

    OMP_NUM_THREADS=1 python benchmarks/overhead.py [--out FILE]

Tiny tensors, so that kernels cost next to nothing; CPU seconds; the variants run in turn in one
process, and the median of the differences counts. Each op saves its output, so that packing and unpacking
it count, too. "Named elsewhere" is an op in a module of the plan, of a kind that the plan names for another
call. A region is one call of `torch.utils.checkpoint`, not
reentrant; what it costs beside its ops is told by cutting the same ops into one region and into many. A
selective one saves nothing here, so that all of its ops run again, as those of a plain one do.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from provenance import publish
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from memfit.core.graph import ValueKey
from memfit.runtime.replay import Decisions, decisions_of

OPS, REPEATS, REGIONS = 400, 41, 20


class Chain(nn.Module):
    """Many small ops in one module call, each of which saves its output."""

    def __init__(self, op: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        self.op = op
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        """[8] -> [8]"""
        x = x * self.weight
        for _ in range(OPS):
            x = self.op(x)
        return x


def seconds(run: Callable[[], object]) -> float:
    """CPU seconds of one call."""
    start_s = time.process_time()
    run()
    return time.process_time() - start_s


def forward(model: nn.Module, x: Tensor, decisions: Decisions | None) -> Tensor:
    """The forward, under the decisions if there are any."""
    with nullcontext() if decisions is None else decisions.replayer(model):
        return model(x).sum()  # type: ignore[no-any-return]


class Nothing(TorchDispatchMode):
    """A mode as one would write it, that only calls the op: what torch itself charges for a mode."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the op."""
        return func(*args, **(kwargs or {}))


def in_a_mode(model: nn.Module, x: Tensor) -> Tensor:
    """The forward in a mode that does nothing."""
    with Nothing():
        return model(x).sum()  # type: ignore[no-any-return]


def in_regions(model: Chain, x: Tensor, regions: int, *, is_selective: bool) -> Tensor:
    """The forward with the ops shared out to so many regions."""

    def some(y: Tensor) -> Tensor:
        for _ in range(OPS // regions):
            y = torch.tanh(y)
        return y

    more = {"context_fn": functools.partial(create_selective_checkpoint_contexts, [])} if is_selective else {}
    y = x * model.weight
    for _ in range(regions):
        y = checkpoint(some, y, use_reentrant=False, **more)
    return y.sum()


def regions_us() -> dict[str, float]:
    """Microseconds an op and a region of `torch.utils.checkpoint`, plain and selective."""
    model, x = Chain(), torch.randn(8)
    found: dict[str, float] = {}
    for name, is_selective in (("checkpoint", False), ("selective", True)):
        one, many = list[float](), list[float]()
        for _ in range(REPEATS):
            plain_s = seconds(lambda: forward(model, x, None).backward())
            for rows, regions in ((one, 1), (many, REGIONS)):
                run_s = seconds(
                    lambda n=regions, s=is_selective: in_regions(model, x, n, is_selective=s).backward()  # type: ignore[misc]
                )
                rows.append((run_s - plain_s) * 1e6)
        region_us = statistics.median(b - a for a, b in zip(one, many, strict=True)) / (REGIONS - 1)
        found[f"{name}, a region"] = region_us
        found[f"{name}, an op"] = (statistics.median(one) - region_us) / OPS
    return found


def measure() -> dict[str, Any]:
    """Microseconds, medians of paired differences."""
    model, planned, x = Chain(), Chain(torch.sigmoid), torch.randn(8)
    outside = decisions_of([ValueKey("model", "aten.exp.default", 0, 0)])  # a plan for an op that never comes
    named = decisions_of([ValueKey("model", "aten.sigmoid.default", OPS, 0)])  # for a call that never comes
    every = decisions_of([ValueKey("model", "aten.sigmoid.default", i, 0) for i in range(OPS)])
    ways: dict[str, tuple[Chain, Decisions]] = {
        "outside the plan": (model, outside),
        "named elsewhere": (planned, named),
        "replayed": (planned, every),
    }
    rows: dict[str, list[float]] = {name: [] for name in ("an empty mode", *ways)}
    for _ in range(REPEATS):
        plain_s = seconds(lambda: forward(model, x, None).backward())
        rows["an empty mode"].append(seconds(lambda: in_a_mode(model, x).backward()) - plain_s)
        for name, (chain, decisions) in ways.items():
            plain_s = seconds(lambda m=chain: forward(m, x, None).backward())  # type: ignore[misc]
            run_s = seconds(lambda m=chain, d=decisions: forward(m, x, d).backward())  # type: ignore[misc]
            rows[name].append(run_s - plain_s)
    found = {
        name: {"us_per_op": statistics.median(values) / OPS * 1e6, "n": REPEATS}
        for name, values in rows.items()
    }
    return found | {name: {"us": value, "n": REPEATS} for name, value in regions_us().items()}


if __name__ == "__main__":
    publish(__doc__, measure)
