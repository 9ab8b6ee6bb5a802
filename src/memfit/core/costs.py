"""Seconds and inner temporaries of ops at one micro-batch size, from measurements at two others.

Ops that look alike (same op, same shapes) in one run are one measurement repeated, so they share the median:
otherwise a plan would be chosen by noise. For the same reason seconds follow one law for the whole step,
``fixed + per_row * rows`` read off the totals of both runs, and not a line of their own each. Bytes have no
noise: each op's temporaries lie on its own line.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from memfit.core.graph import Op, OpKey, Profile, StepGraph

Run = tuple[StepGraph, Sequence[Hashable], Sequence[int | None]]


@dataclass(frozen=True, slots=True)
class Measured:
    """What each op of a run of ``rows`` rows took, by call site."""

    rows: int
    seconds: dict[OpKey, float]
    temporary_bytes: dict[OpKey, int]
    made_bytes: dict[OpKey, int] = field(default_factory=dict)


def measured(graph: StepGraph, signatures: Sequence[Hashable], peaks_bytes: Sequence[int | None]) -> Measured:
    """Reads a recorded run: medians over ops that look alike, and what each allocated beyond its outputs."""
    alike: dict[Hashable, list[float]] = defaultdict(list)
    for op, signature in zip(graph.ops, signatures, strict=True):
        alike[signature].append(op.seconds)
    medians = {signature: statistics.median(seconds) for signature, seconds in alike.items()}
    temporary_bytes = {}
    for op, peak_bytes in zip(graph.ops, peaks_bytes, strict=True):
        # A sum that autograd does in place shows its output here and has none in the graph.
        if peak_bytes is not None and (op.allocates or ".add." not in op.key.op):
            made_bytes = sum(graph.storages[s].size_bytes for s in op.allocates)
            temporary_bytes[op.key] = max(0, peak_bytes - made_bytes)
    seconds = {op.key: medians[s] for op, s in zip(graph.ops, signatures, strict=True)}
    return Measured(graph.rows, seconds, temporary_bytes, forward_bytes(graph))


class AlikeCost(NamedTuple):
    """What ops of one look take: the least of their medians by run, the most of their inner temporaries."""

    seconds: float
    temporary_bytes: int


def costs_alike(runs: Sequence[Run]) -> dict[Hashable, AlikeCost]:
    """What each kind of op took in the quickest of some runs.

    Args:
        runs: Graph, signatures and inner peaks (bytes, None: unseen) of each op.
    """
    found: dict[Hashable, AlikeCost] = {}
    for graph, signatures, peaks_bytes in runs:
        took = measured(graph, signatures, peaks_bytes)
        for op, signature in zip(graph.ops, signatures, strict=True):
            temporary_bytes = took.temporary_bytes.get(op.key, 0)
            known = found.get(signature, AlikeCost(took.seconds[op.key], temporary_bytes))
            found[signature] = AlikeCost(
                min(known.seconds, took.seconds[op.key]), max(known.temporary_bytes, temporary_bytes)
            )
    return found


def with_costs_alike(run: Run, known: Mapping[Hashable, AlikeCost]) -> StepGraph:
    """A graph with what ops of the same look took; seconds of the others are scaled like the sum of those."""
    graph, signatures, _ = run
    pairs = [(op, known.get(signature)) for op, signature in zip(graph.ops, signatures, strict=True)]
    estimated_s = sum(op.seconds for op, cost in pairs if cost is not None)
    measured_s = sum(cost.seconds for _, cost in pairs if cost is not None)
    scale = measured_s / estimated_s if estimated_s else 1.0
    ops = [
        replace(op, seconds=op.seconds * scale)
        if cost is None
        else replace(op, seconds=cost.seconds, temporary_bytes=cost.temporary_bytes)
        for op, cost in pairs
    ]
    return replace(graph, ops=tuple(ops))


def at_speed(profile: Profile, factor: float) -> Profile:
    """A profile in which forward and backward take this many times as long; what a real step corrects."""
    graphs = tuple(
        replace(graph, ops=tuple(_at_speed(op, factor) for op in graph.ops)) for graph in profile.graphs
    )
    loss = replace(profile.loss_of_all, ops=tuple(_at_speed(op, factor) for op in profile.loss_of_all.ops))
    return replace(profile, graphs=graphs, loss_of_all=loss, fixed_s=profile.fixed_s * factor)


def _at_speed(op: Op, factor: float) -> Op:
    """An op that takes this many times as long."""
    return replace(op, seconds=op.seconds * factor, overhead_s=op.overhead_s * factor)


def with_overhead(graph: StepGraph, overhead_s: float, *, is_asynchronous: bool) -> StepGraph:
    """The graph with what replaying an op of the forward costs beside the op itself.

    Args:
        is_asynchronous: The device computes while Python runs ahead, so only what is longer than the op's
            own kernel counts. That is still an upper bound: slack of one op also hides the next.
    """
    ops = [
        replace(op, overhead_s=max(0.0, overhead_s - op.seconds) if is_asynchronous else overhead_s)
        for op in graph.ops[: graph.forward_ops]
    ]
    return replace(graph, ops=(*ops, *graph.ops[graph.forward_ops :]))


def forward_bytes(graph: StepGraph) -> dict[OpKey, int]:
    """What each op of the forward allocates for its outputs."""
    return {
        op.key: sum(graph.storages[s].size_bytes for s in op.allocates)
        for op in graph.ops[: graph.forward_ops]
        if op.allocates
    }


def quicker(one: Measured, other: Measured) -> Measured:
    """Each op as quick as in the quicker of two runs, which other work on the machine disturbed less."""
    seconds = {key: min(s, other.seconds.get(key, s)) for key, s in one.seconds.items()}
    highest = {
        key: max(size, other.temporary_bytes.get(key, size)) for key, size in one.temporary_bytes.items()
    }
    return replace(one, seconds=seconds, temporary_bytes=highest)


def with_costs(
    graph: StepGraph, small: Measured, large: Measured, more: Sequence[Measured] = ()
) -> StepGraph:
    """The graph with seconds and temporaries carried over from two measured sizes (or twice the same).

    An op neither run saw keeps what it has.

    Args:
        more: Temporaries of some ops at other numbers of rows, such as the most there are. Between two sizes
            they lie on the line through both, which is never too low where temporaries grow ever faster (a
            convolution's). One row is a size of its own: it tells of others only where a single other is
            known.
    """
    fixed = fixed_share(small, large)
    growth = fixed + (1.0 - fixed) * graph.rows / large.rows
    ops = []
    for op in graph.ops:
        if op.key in large.seconds:
            op = replace(op, seconds=large.seconds[op.key] * growth)
        if op.key in large.temporary_bytes:
            most = large.temporary_bytes[op.key]
            found = {small.rows: small.temporary_bytes.get(op.key, most), large.rows: most}
            found |= {p.rows: p.temporary_bytes[op.key] for p in more if op.key in p.temporary_bytes}
            several = {rows: size for rows, size in found.items() if rows > 1}
            line = several if len(several) > 1 else found
            size = found[graph.rows] if graph.rows in found else _between(line, graph.rows)
            op = replace(op, temporary_bytes=round(size))
        ops.append(op)
    return replace(graph, ops=tuple(ops))


def with_seconds_of(loss: StepGraph, graph: StepGraph, *, but: Measured) -> StepGraph:
    """The graph of as many rows as a loss, with the seconds that the loss's own ops took by themselves.

    Args:
        but: What was measured of the graph itself, which is left as it is.
    """
    if graph.rows != loss.rows:
        return graph
    took_s = {op.key: op.seconds for op in loss.ops if op.key not in but.seconds}
    return replace(graph, ops=tuple(replace(op, seconds=took_s.get(op.key, op.seconds)) for op in graph.ops))


def fixed_share(small: Measured, large: Measured) -> float:
    """The part of the larger run's seconds that does not grow with the rows, between 0 and 1."""
    if small.rows >= large.rows:
        return 0.0
    common = small.seconds.keys() & large.seconds.keys()
    less_s, more_s = (sum(point.seconds[key] for key in common) for point in (small, large))
    per_row_s = (more_s - less_s) / (large.rows - small.rows)
    return min(1.0, max(0.0, 1.0 - per_row_s * large.rows / max(more_s, 1e-12)))


def scaled(small: StepGraph, large: StepGraph, rows: int) -> StepGraph:
    """The graph at another number of rows, from two that were recorded (or one, twice).

    Where both did the same things in the same order, bytes and seconds lie on the line through both.
    Where they did not, or there is one size only, what does not persist grows with the rows.
    """
    same = small.rows != large.rows and small.log == large.log
    same = same and [op.key for op in small.ops] == [op.key for op in large.ops]
    storages = []
    for index, storage in enumerate(large.storages):
        if same:
            slope = (storage.size_bytes - small.storages[index].size_bytes) / (large.rows - small.rows)
            size_bytes = round(storage.size_bytes + slope * (rows - large.rows))
        else:
            grows = 1.0 if storage.persists else rows / large.rows
            size_bytes = round(storage.size_bytes * grows)
        storages.append(replace(storage, size_bytes=max(0, size_bytes)))
    ops = []
    for index, op in enumerate(large.ops):
        least_s = small.ops[index].seconds if same else 0.0  # what a launch takes at any size
        seconds = _line(small.rows if same else 0, least_s, large.rows, op.seconds, rows)
        ops.append(replace(op, seconds=seconds))
    return replace(large, rows=rows, storages=tuple(storages), ops=tuple(ops))


def with_made_bytes(graph: StepGraph, small: Measured, large: Measured) -> StepGraph:
    """A scaled graph corrected by runs of more rows: what an op makes lies on the line through those.

    Workspaces do not grow in proportion (MKL-DNN's LSTM), so the nearer the measured sizes, the better.
    """
    storages = list(graph.storages)
    expected = large.made_bytes.keys() & small.made_bytes.keys()
    for op in graph.ops[: graph.forward_ops]:
        if op.key in expected and op.allocates:
            one, two = small.made_bytes[op.key], large.made_bytes[op.key]
            made_bytes = sum(storages[s].size_bytes for s in op.allocates)
            missing = round(_line(small.rows, one, large.rows, two, graph.rows)) - made_bytes
            biggest = max(op.allocates, key=lambda s: storages[s].size_bytes)
            size_bytes = max(0, storages[biggest].size_bytes + missing)
            storages[biggest] = replace(storages[biggest], size_bytes=size_bytes)
    return replace(graph, storages=tuple(storages))


def _between(points: Mapping[int, float], rows: int) -> float:
    """What lies on the line through the neighbours of ``rows`` among some points, or the last two beyond."""
    sizes = sorted(points)
    above = next((i for i, size in enumerate(sizes) if size >= rows), len(sizes) - 1)
    one, other = sizes[max(0, above - 1)], sizes[max(above, min(1, len(sizes) - 1))]
    return _line(one, points[one], other, points[other], rows)


def _line(rows_a: int, a: float, rows_b: int, b: float, rows: int) -> float:
    """The line through two points, never falling and never below nothing."""
    if rows_a == rows_b:
        return b * max(1.0, rows / rows_b)
    slope = max(0.0, (b - a) / (rows_b - rows_a))
    return max(0.0, b + slope * (rows - rows_b))
