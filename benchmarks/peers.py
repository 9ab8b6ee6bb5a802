"""memfit against every other way to train in less memory, at equal measured peaks.

    OMP_NUM_THREADS=1 python benchmarks/peers.py [--models gpt2 bert] [--out FILE]

Note [Peers]
 1. The step is forward and backward of a batch that is not split: ``optimizer.step()`` is the same for all.
    Parameters, buffers and the batch are there, gradients are not yet.
 2. Peers: every k-th block under torch.utils.checkpoint, for all k; selective checkpointing that saves what
    matmuls, convolutions and attention make; the model's own gradient checkpointing; optimal schedules of
    whole blocks (``rotor.py``). Each is measured: the peak by memfit's meter, the allocator's account.
 3. memfit gets the measured peak of each peer as its memory, exactly, and some budgets below the lowest.
 4. Gradients of each are compared with the plain step's to the bit, buffers too.
 5. CPU time: all settings of a model take turns in one process, in rounds; what counts of a setting is the
    median over rounds of its seconds less those of the plain step in the same round.
 6. Because a shared machine is noisy, a measure that is not: torch's profiler counts the operators of each
    kind (name and shapes) that a step runs more often than the plain one does, at the median seconds that
    kind takes in plain steps. This leaves Python out, of memfit and of the peers.
 7. The allocator of libc keeps freed memory, as that of a GPU does: else the kernel clears each page of a
    large tensor anew, which is what would be measured.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from overhead import seconds
from peer_models import JOBS, Job, own_loss
from peer_ways import by_transformers, checkpointed, measured_blocks, saving_matmuls, scheduled
from provenance import provenance
from rotor import schedules, shown
from torch import Tensor

import memfit
from memfit.core.plan import Planner
from memfit.runtime.accumulate import Accumulation
from memfit.runtime.count import counter_named
from memfit.runtime.meter import PeakMeter, resident_bytes

ROUNDS, PRICED_STEPS, ROTOR_LEVELS, BELOW = 3, 3, 7, 3
_SAME_BUDGET = 0.03  # of the activations: budgets nearer to each other are one
Way = Callable[[], AbstractContextManager[Any]]
Kind = tuple[str, str]
Row = dict[str, Any]


@dataclass(slots=True)
class Setting:
    """A way to run the step, and what was measured of it."""

    peer: str
    name: str
    run: Callable[[], object]
    way: Way = nullcontext
    is_split: bool = False
    row: Row = field(default_factory=dict)
    cpu_s: list[float] = field(default_factory=list)


class Bench:
    """One model, one batch, and the plain step that all are compared with."""

    def __init__(self, job: Job, device: str) -> None:
        self.job, self.device = job, torch.device(device)
        torch.manual_seed(0)
        self.model = job.build().to(self.device)
        self.batch = {name: part.to(self.device) for name, part in job.batch(job.rows).items()}
        self._parameters = list(self.model.parameters())
        self._buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        self.blocks = [b for path in job.lists for b in self.model.get_submodule(path).children()]
        self._prices: dict[Kind, float] = {}
        self._plain_ops: Counter[Kind] = Counter()

    def plain(self, parts: int = 1) -> None:
        """Forward and backward, in so many equal parts."""
        size = self.job.rows // parts
        for first in range(0, self.job.rows, size):
            part = {name: tensor[first : first + size] for name, tensor in self.batch.items()}
            (own_loss(self.model, part) / parts).backward()

    def begin(self) -> None:
        """As if no step had been."""
        self.model.zero_grad()
        for buffer, first in self._buffers:
            buffer.copy_(first)
        torch.manual_seed(1)

    def resident_bytes(self) -> int:
        """What is there before the step."""
        return resident_bytes([*self.model.parameters(), *self.model.buffers(), *self.batch.values()])

    def state(self) -> tuple[list[Tensor | None], list[Tensor]]:
        """Gradients and buffers after a step."""
        gradients = [None if p.grad is None else p.grad.clone() for p in self._parameters]
        return gradients, [buffer.clone() for buffer, _ in self._buffers]

    def measure(self, setting: Setting, plain: tuple[Any, Any] | None) -> None:
        """Peak, equality with the plain step, and the operators that run again."""
        with setting.way():
            self.begin()
            with PeakMeter(self.device) as meter:
                setting.run()
            equal = [None, None] if plain is None else list(map(_equal, self.state(), plain))
            again = self._again(setting) if self._prices else {}
        setting.row |= {
            "model": self.job.name,
            "peer": setting.peer,
            "name": setting.name,
            "peak_bytes": self.resident_bytes() + meter.peak_bytes,
            "gradients_equal": equal[0],
            "buffers_equal": equal[1],
            **again,
        }

    def price(self) -> None:
        """What each kind of operator takes in plain steps."""
        seconds: dict[Kind, list[float]] = defaultdict(list)
        for _ in range(PRICED_STEPS):
            self.begin()
            found = _operators(self.plain)
            for kind, taken_s in found:
                seconds[kind].append(taken_s)
        self._plain_ops = Counter(kind for kind, _ in found)
        self._prices = {kind: statistics.median(taken) for kind, taken in seconds.items()}

    def _again(self, setting: Setting) -> Row:
        """What runs more often than in the plain step."""
        self.begin()
        found = _operators(setting.run)
        more = Counter(kind for kind, _ in found) - self._plain_ops
        own: dict[Kind, list[float]] = defaultdict(list)
        for kind, taken_s in found:
            own[kind].append(taken_s)
        new = {kind: statistics.median(own[kind]) for kind in more if kind not in self._prices}
        return {
            "ops_again": sum(more.values()),
            "again_s": sum(count * (self._prices | new)[kind] for kind, count in more.items()),
            "unknown_s": sum(more[kind] * taken_s for kind, taken_s in new.items()),
        }


def _equal(own: list[Any], other: list[Any]) -> bool | None:
    """To the bit."""
    return all(
        a is b if a is None or b is None else torch.equal(a, b) for a, b in zip(own, other, strict=True)
    )


def _operators(run: Callable[[], object]) -> list[tuple[Kind, float]]:
    """Each operator that runs, below autograd and inside of others too: kind, and seconds of its own.

    One that goes to a dispatch mode, or to a kernel in Python, is called from there again, and counts there.
    """
    with torch.autograd.profiler.profile(record_shapes=True) as profiler:
        run()
    return [
        ((event.name, str(event.input_shapes)), event.self_cpu_time_total * 1e-6)
        for event in profiler.function_events
        if event.name.startswith("aten::")
        and not any(child.name in ("PythonDispatchMode", event.name) for child in event.cpu_children)
    ]


# ---- settings ----------------------------------------------------------------------------------------


def peers_of(bench: Bench) -> Iterator[Setting]:
    """Every peer at every setting."""
    blocks, run = bench.blocks, bench.plain
    for k in range(1, len(blocks)):
        if k == 1 or -(-len(blocks) // k) < -(-len(blocks) // (k - 1)):  # fewer blocks than before
            name = "every block" if k == 1 else f"every block of {k}"
            yield Setting("every k-th block", name, run, partial(checkpointed, blocks[::k]))
    selective = partial(checkpointed, blocks, context_fn=saving_matmuls)
    yield Setting("selective", "matmuls and attention saved", run, selective)
    if getattr(bench.model, "supports_gradient_checkpointing", False):
        for n in (1, 2):
            yield Setting(
                "transformers", f"every_n_layers={n}", run, partial(by_transformers, bench.model, n)
            )
    if bench.job.is_chain:
        yield from rotor_of(bench)


def rotor_of(bench: Bench) -> Iterator[Setting]:
    """Optimal schedules of whole blocks at some memories."""
    bench.begin()
    chain = measured_blocks(bench.model, bench.job.lists, lambda: own_loss(bench.model, bench.batch))
    for schedule in schedules(chain, ROTOR_LEVELS):
        way = partial(scheduled, bench.model, bench.job.lists, schedule[:-1])
        yield Setting("Rotor", shown(schedule[:-1]), bench.plain, way)


def split_of(bench: Bench) -> Iterator[Setting]:
    """The batch accumulated: alone, and with blocks checkpointed."""
    rows = bench.job.rows
    if bench.job.count is None:
        return
    for parts in dict.fromkeys((2, rows)):
        run = partial(bench.plain, parts)
        name = f"{parts} x {rows // parts}"
        yield Setting("accumulation alone", name, run, is_split=True)
        way = partial(checkpointed, bench.blocks)
        yield Setting("every block, accumulated", name, run, way, is_split=True)
        way = partial(checkpointed, bench.blocks, context_fn=saving_matmuls)
        yield Setting("selective, accumulated", name, run, way, is_split=True)


def budgets(peers: list[Setting], plain: Setting) -> list[int]:
    """The measured peaks of peers from the lowest of checkpointing by hand to the plain one."""
    plain_bytes = plain.row["peak_bytes"]
    peaks = sorted({s.row["peak_bytes"] for s in peers if s.row["peak_bytes"] < plain_bytes})
    near = (plain_bytes - peaks[0]) * _SAME_BUDGET
    return [low for low, high in pairwise([*peaks, plain_bytes]) if high - low > near]


def memfit_at(bench: Bench, planner: Planner, profile: memfit.Profile, budget_bytes: int) -> Setting:
    """memfit within a budget, its own first steps, in which it verifies itself, done."""
    start_s = time.process_time()
    plan = replace(planner.best(budget_bytes), budget_bytes=budget_bytes)
    plan_s = time.process_time() - start_s
    count = counter_named(bench.job.count or "rows")
    step = memfit.Step(
        Accumulation(bench.model, own_loss, count),
        plan,
        profile,
        optimizer=None,
        find=lambda profile: memfit.find_plan(profile, memory=budget_bytes),
    )
    for _ in range(2):
        bench.begin()
        step(bench.batch)
    parts = plan.gradient_accumulation_steps
    peer, name = (
        ("memfit", "") if parts == 1 else ("memfit, accumulated", f"{parts} x {plan.micro_batch_size}")
    )
    setting = Setting(peer, name, lambda: step(bench.batch), is_split=parts > 1)
    setting.row |= {
        "budget_bytes": budget_bytes,
        "predicted_bytes": step.plan.predicted_peak_bytes,
        "attempts": step.verdict.attempts if step.verdict else 0,
        "plan_s": plan_s,
        "planned_again_s": plan.recompute_s,
        "gap_of_step": plan.optimality_gap,
    }
    return setting


def memfits_of(bench: Bench, peers: list[Setting], plain: Setting, row: Row) -> Iterator[Setting]:
    """memfit at the peak of every peer, and below them all."""
    start_s = time.process_time()
    profile = profile_of(bench, bench.job.rows)
    row["profile_s"] = time.process_time() - start_s
    planner = Planner(profile)
    row["least_bytes"] = least = planner.lowest().predicted_peak_bytes
    wanted = budgets([s for s in peers if not s.is_split], plain)
    row["find_plan_s"] = seconds(partial(memfit.find_plan, profile, memory=wanted[len(wanted) // 2]))
    below = [least + (wanted[0] - least) * i // BELOW for i in range(BELOW)] if least < wanted[0] else []
    for budget_bytes in [*below, *(b for b in wanted if b >= least)]:
        yield memfit_at(bench, planner, profile, budget_bytes)
    if bench.job.count is not None:
        profile = profile_of(bench, None)
        planner = Planner(profile)
        row["least_accumulated_bytes"] = planner.lowest().predicted_peak_bytes
        for setting in peers:
            peak_bytes = setting.row["peak_bytes"]
            if setting.peer == "accumulation alone" and peak_bytes >= row["least_accumulated_bytes"]:
                yield memfit_at(bench, planner, profile, peak_bytes)


def profile_of(bench: Bench, micro_batch_size: int | None) -> memfit.Profile:
    """What a step does, as memfit sees it."""
    bench.begin()
    return memfit.profile(
        bench.model, own_loss, bench.batch, micro_batch_size=micro_batch_size, limit_bytes=1 << 40
    )


# ---- the largest batch -------------------------------------------------------------------------------


def largest(job: Job, device: str) -> list[Row]:
    """The most rows at once under the peak of a plain step on half the rows, for the main ways."""
    half = replace(job, rows=job.rows // 2)
    bench = Bench(half, device)
    budget_bytes = _peak_bytes(bench, nullcontext)
    ways: dict[str, Callable[[Bench], Way]] = {
        "plain": lambda bench: nullcontext,
        "every block": lambda bench: partial(checkpointed, bench.blocks),
        "selective": lambda bench: partial(checkpointed, bench.blocks, context_fn=saving_matmuls),
    }
    found = {
        name: _most_rows(job, budget_bytes, lambda rows, way=way: _peak_at(job, device, rows, way))
        for name, way in ways.items()
    }
    found["memfit"] = _most_rows(job, budget_bytes, lambda rows: _memfit_at(job, device, rows, budget_bytes))
    return [
        {"model": job.name, "peer": "largest", "name": name, "rows": rows, "budget_bytes": budget_bytes}
        for name, rows in found.items()
    ]


def _most_rows(job: Job, budget_bytes: int, peak: Callable[[int], int]) -> int:
    """The most rows within a budget: the peak grows by nearly as much with each."""
    few, many = max(1, job.rows // 2), job.rows
    few_bytes, many_bytes = peak(few), peak(many)
    per_row = max(1.0, (many_bytes - few_bytes) / (many - few))
    rows = max(1, int(few + (budget_bytes - few_bytes) / per_row))
    while rows > 1 and peak(rows) > budget_bytes:
        rows -= 1
    return rows


def _peak_at(job: Job, device: str, rows: int, way: Callable[[Bench], Way]) -> int:
    """The measured peak of so many rows."""
    bench = Bench(replace(job, rows=rows), device)
    return _peak_bytes(bench, way(bench))


def _peak_bytes(bench: Bench, way: Way) -> int:
    with way():
        bench.begin()
        with PeakMeter(bench.device) as meter:
            bench.plain()
    return bench.resident_bytes() + meter.peak_bytes


def _memfit_at(job: Job, device: str, rows: int, budget_bytes: int) -> int:
    """memfit's least peak, measured if it is within the budget."""
    bench = Bench(replace(job, rows=rows), device)
    profile = profile_of(bench, rows)
    planner = Planner(profile)
    least = planner.lowest().predicted_peak_bytes
    if least > budget_bytes:
        return least
    setting = memfit_at(bench, planner, profile, least)
    bench.measure(setting, None)
    peak_bytes: int = setting.row["peak_bytes"]
    return peak_bytes


# ---- one model ---------------------------------------------------------------------------------------


def compare(job: Job, device: str, rounds: int, said: Callable[[str], None]) -> list[Row]:
    """All settings of a model."""
    bench = Bench(job, device)
    for _ in range(2):
        bench.begin()
        bench.plain()
    plain = Setting("plain", "plain", bench.plain)
    bench.measure(plain, None)
    bench.begin()
    bench.plain()
    state = bench.state()
    bench.price()
    model_row: Row = {"model": job.name, "peer": "model", "rows": job.rows}
    settings = [plain]
    for found in (
        lambda: peers_of(bench),
        lambda: split_of(bench),
        lambda: memfits_of(bench, settings[1:], plain, model_row),
    ):
        for setting in found():
            bench.measure(setting, None if setting.is_split else state)
            settings.append(setting)
            said(_line(setting.row))
    in_turn(bench, settings, rounds)
    for setting in settings:
        setting.row["cpu_s"] = statistics.median(setting.cpu_s)
        setting.row["extra_cpu_s"] = statistics.median(
            own - base for own, base in zip(setting.cpu_s, plain.cpu_s, strict=True)
        )
        said(_line(setting.row))
    return [model_row, *(setting.row for setting in settings)]


def in_turn(bench: Bench, settings: list[Setting], rounds: int) -> None:
    """The CPU seconds of every setting, in rounds."""
    gc.collect()
    gc.disable()
    for _ in range(rounds):
        for setting in settings:
            with setting.way():
                bench.begin()
                setting.cpu_s.append(seconds(setting.run))
        gc.collect()
    gc.enable()


def _line(row: Row) -> str:
    """A row for people."""
    budget = f"  of {row['budget_bytes']:12,}" if "budget_bytes" in row else ""
    extra = f"  {row['extra_cpu_s']:+.3f} s of CPU time" if "extra_cpu_s" in row else ""
    wrong = "  OTHER GRADIENTS" if row["gradients_equal"] is False else ""
    return (
        f"{row['model']:9} {row['peer']:17} {row['name'][:40]:40} {row['peak_bytes']:12,}{budget}  again "
        f"{row.get('again_s', 0.0):.3f} s ({row.get('unknown_s', 0.0):.3f} unknown){extra}{wrong}"
    )


def keep_freed_memory() -> None:
    """See Note [Peers] 7."""
    libc = ctypes.CDLL(None)
    libc.mallopt(-4, 0)  # M_MMAP_MAX
    libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def _of_commit(path: Path) -> list[Row]:
    """The rows of another result; that of each model says of which commit they are."""
    found = json.loads(path.read_text())
    told = {"commit": found["provenance"]["commit"]}
    return [told | row if row["peer"] == "model" else row for row in found["rows"]]


def _joined(paths: Sequence[Path]) -> list[Row]:
    """The rows of several results; of a model that is in more than one, those of the last."""
    found = dict[str, list[Row]]()
    for path in paths:
        rows = _of_commit(path)
        found |= {name: [row for row in rows if row["model"] == name] for name in {r["model"] for r in rows}}
    return [row for name in JOBS for row in found.get(name, [])]


def main() -> None:
    """Measures model by model, and writes after each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="*", choices=list(JOBS), default=list(JOBS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--also", nargs="+", type=Path, default=[], help="other results to join; of a model the last"
    )
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    keep_freed_memory()
    rows = [row for row in _joined(options.also) if row["model"] not in options.models]
    for name in options.models:
        said = partial(print, flush=True)
        rows += compare(JOBS[name], options.device, options.rounds, said)
        rows += (most := largest(JOBS[name], options.device))
        said(f"{name} largest batch: " + ", ".join(f"{row['name']} {row['rows']} rows" for row in most))
        _write(rows, options.out)
    _write(rows, options.out)


def _write(rows: list[Row], out: Path | None) -> None:
    """Writes what there is by now."""
    if out:
        out.write_text(json.dumps({"provenance": provenance(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
