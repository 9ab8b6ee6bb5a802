"""What the documentation shows: what goes wrong in accumulation by hand, and what each way to save costs.

    OMP_NUM_THREADS=1 python benchmarks/traps.py [--out FILE]

*Traps*: losses and layers of ``tests/audits.py`` in float64, micro-batches of 3, 3 and 2 rows. By hand is
what most loops do, ``(loss / micro_batches).backward()``; the judge of both is one backward of the whole
batch. *Peaks* are the CPU allocator's own account of forward and backward, parameters and batch included,
with ``.grad`` None at the start. Seconds are processor time of this process, the least of a few steps.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accumulation import _flat, _relative, made
from provenance import publish
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import audits
import memfit
from memfit.core.batching import parts_for
from memfit.errors import InexactAccumulation
from memfit.runtime.batch import split
from memfit.runtime.meter import PeakMeter, resident_bytes
from memfit.workloads.text import workload

ROWS, REPEATS = 64, 3
PARTS = (3, 3, 2)
SIZES = (64, 32, 16, 8, 4)
SHOWN = (
    *(
        "mse mean",
        "token ce",
        "causal ce",
        "class-weighted ce",
        "ce sum",
        "token ce + auxiliary loss by rows",
    ),
    *("rmse", "InfoNCE", "normalised advantages", "BatchNorm", "spectral norm", "clamping hook"),
)
Body = Callable[[], object]
Row = dict[str, Any]


def traps() -> list[Row]:
    """One row a loss: the error of the gradient by hand and with memfit."""
    cases = {case.name: case for case in (*audits.REPORT, *audits.MORE)}
    return [trap(cases[name]) for name in SHOWN]


def trap(case: audits.Case) -> Row:
    """One of them; where memfit refuses to split, its error is that of the whole batch."""
    (whole, batch), (hand, _), (model, _) = made(case), made(case), made(case)
    case.loss(whole, batch).backward()
    for part in split(batch, PARTS):
        (case.loss(hand, part) / len(PARTS)).backward()
    try:
        step = memfit.fit(model, case.loss, batch, memory="1GiB", micro_batch_size=3)
    except InexactAccumulation:
        step = memfit.fit(model, case.loss, batch, memory="1GiB")
    step(batch)
    by_hand, with_memfit = (_relative(_flat(net), _flat(whole)) for net in (hand, model))
    row = {"kind": "trap", "name": case.name, "class": case.kind.value, "by_hand": by_hand}
    return row | {"memfit": with_memfit, "is_split": step.plan.gradient_accumulation_steps > 1}


def costs() -> list[Row]:
    """The byte-level GPT of ``memfit train``: in parts, every block checkpointed, memfit within as much."""
    job = workload(batch_size=ROWS)
    model, loss_fn, batch = job.model, job.loss_fn, next(job.batches_from(0))
    held_bytes = resident_bytes([*model.parameters(), *batch.values()])
    found = [measured("parts", s, held_bytes, model, in_parts(model, loss_fn, batch, s)) for s in SIZES]
    with memfit.apply_gradient_checkpointing(model):
        body = in_parts(model, loss_fn, batch, ROWS)
        found.append(measured("every block", ROWS, held_bytes, model, body))
    lowest_bytes, highest_bytes = found[-1]["peak_bytes"], found[0]["peak_bytes"]
    for share in (0.0, 0.25, 0.5):
        budget_bytes = int(lowest_bytes + share * (highest_bytes - lowest_bytes))
        step = memfit.fit(model, loss_fn, batch, memory=budget_bytes, micro_batch_size=ROWS)
        row = measured("memfit", ROWS, held_bytes, model, partial(step, batch))
        found.append(row | {"budget_bytes": budget_bytes, "share_of_the_way": share})
    return found


def wide() -> list[Row]:
    """Large weights and few rows: the gradients that wait for the next micro-batch outweigh what it saves."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 8192))
    batch = {"x": torch.randn(16, 512), "y": torch.randint(8192, (16,))}
    held_bytes = resident_bytes([*model.parameters(), *batch.values()])

    def loss_fn(net: nn.Module, part: Any) -> Tensor:
        return functional.cross_entropy(net(part["x"]), part["y"])

    sizes = (16, 8, 4)
    return [measured("wide", s, held_bytes, model, in_parts(model, loss_fn, batch, s)) for s in sizes]


def in_parts(model: nn.Module, loss_fn: Any, batch: Any, size: int) -> Body:
    """The step as everybody writes it."""
    rows = len(next(iter(batch.values())))

    def body() -> None:
        start = 0
        for many in parts_for(rows, size):
            part = {name: t[start : start + many] for name, t in batch.items()}
            (loss_fn(model, part) * (many / rows)).backward()
            start += many

    return body


def measured(what: str, size: int, held_bytes: int, model: nn.Module, body: Body) -> Row:
    """Peak and seconds of a step."""
    times, peak_bytes = [], 0
    for turn in range(REPEATS + 2):  # memfit measures its own first two steps
        model.zero_grad()
        started_s = time.process_time()
        if turn == REPEATS + 1:
            with PeakMeter("cpu") as meter:
                body()
            peak_bytes = held_bytes + meter.peak_bytes
        else:
            body()
            times.append(time.process_time() - started_s)
    row = {"kind": what, "micro_batch_size": size, "peak_bytes": peak_bytes}
    return row | {"step_cpu_s": min(times), "gradients_bytes": resident_bytes(model.parameters())}


if __name__ == "__main__":
    publish(__doc__, lambda: [*traps(), *costs(), *wide()])
