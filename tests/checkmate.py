"""Checkmate's program over whole schedules, as an oracle: which op runs in which stage, what is kept.

Source: Jain et al., arXiv:1910.02653. ``R[t, i]``: op i runs in stage t; ``S[t, i]``: its value is kept from
the stage before; what is alive within a stage is a variable bounded from below by what is still to come, in
place of their FREE. Every op may run any number of times, so no plan can be faster. Ops have one output
each, none writes in place, and none has a generator state. A stage is a forward op, an unpacked save, or a
backward op.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from memfit.core.graph import LogKind, StepGraph


class Stage(NamedTuple):
    """What must run and be there, what the program holds since before, and the bytes that gradients take."""

    runs: int
    needs: frozenset[int]
    held: frozenset[int]
    gradient_bytes: int
    may_replay: bool


def stages(graph: StepGraph) -> Iterator[Stage]:
    """The stages of a step, in order."""
    alive: set[int] = set()
    held: set[int] = set()
    needs: list[int] = []
    for kind, item in graph.log:
        if kind == LogKind.OP and item < graph.forward_ops:
            yield Stage(item, frozenset(), frozenset(held), 0, True)
            held.add(item)
        elif kind == LogKind.OP:
            alive.update(graph.ops[item].allocates)
            taken = _bytes(graph, alive) + graph.ops[item].temporary_bytes
            yield Stage(-1, frozenset(needs), frozenset(held), taken, False)
        elif kind == LogKind.UNPACK:
            needs.append(graph.values[graph.saves[item].value].producer)
            yield Stage(-1, frozenset(needs), frozenset(held), _bytes(graph, alive), True)
        elif kind == LogKind.RELEASE:
            producer = graph.values[graph.saves[item].value].producer
            if producer in needs:
                needs.remove(producer)
        elif kind == LogKind.FREE:
            alive.discard(item)
            held -= {i for i in held if item in graph.ops[i].allocates}


def _bytes(graph: StepGraph, storages: set[int]) -> int:
    return sum(graph.storages[s].size_bytes for s in storages)


class _Rows:
    """Rows ``terms <= limit`` over numbered variables."""

    def __init__(self) -> None:
        self.names: dict[tuple[str, int, int, int], int] = {}
        self.entries: list[tuple[int, int, float]] = []
        self.limits: list[float] = []

    def var(self, kind: str, t: int, i: int, k: int = 0) -> int:
        return self.names.setdefault((kind, t, i, k), len(self.names))

    def at_most(self, limit: float, *terms: tuple[float, int]) -> None:
        self.entries += [(len(self.limits), column, factor) for factor, column in terms]
        self.limits.append(limit)


def fastest_schedule_s(graph: StepGraph, free_bytes: int) -> float | None:
    """Seconds of recomputation of the best schedule within some bytes; None if there is none."""
    rows, every, ops = _Rows(), list(stages(graph)), range(graph.forward_ops)
    lower: dict[int, float] = {}
    upper: dict[int, float] = {}
    for t, stage in enumerate(every):
        for i in ops:
            run, kept = rows.var("R", t, i), rows.var("S", t, i)
            allowed = stage.runs == i or (stage.may_replay and graph.ops[i].is_replayable)
            upper[run] = float(allowed and (stage.runs < 0 or i <= stage.runs))
            lower[run] = float(stage.runs == i)
            upper[kept] = float(t > 0)
            lower[kept] = float(i in stage.held)
            if i in stage.needs:
                rows.at_most(-1.0, (-1.0, run), (-1.0, kept))
            for read in _reads(graph, i):
                rows.at_most(0.0, (1.0, run), (-1.0, rows.var("R", t, read)), (-1.0, rows.var("S", t, read)))
            if t:
                before = (-1.0, rows.var("R", t - 1, i)), (-1.0, rows.var("S", t - 1, i))
                rows.at_most(0.0, (1.0, kept), *before)
        for k in ops:
            _memory(rows, graph, every, t, k, free_bytes)
    return _solved(rows, graph, lower, upper)


def _reads(graph: StepGraph, op: int) -> set[int]:
    return {graph.values[v].producer for v in graph.ops[op].inputs if graph.values[v].producer >= 0}


def _memory(rows: _Rows, graph: StepGraph, every: list[Stage], t: int, k: int, free_bytes: int) -> None:
    """What is alive while op k runs in stage t, or would."""
    total = [(float(graph.ops[k].temporary_bytes), rows.var("R", t, k))]
    for i in range(graph.forward_ops):
        live = rows.var("P", t, i, k)
        total.append((float(_bytes(graph, set(graph.ops[i].allocates))), live))
        reasons = [rows.var("S", t, i)] if k < i else []
        if k >= i:
            reasons += [rows.var("R", t, j) for j in range(k, graph.forward_ops) if i in _reads(graph, j)]
            reasons += [rows.var("S", t + 1, i)] if t + 1 < len(every) else []
            reasons += [rows.var("R", t, k)] if k == i else []
            if i in every[t].needs:
                rows.at_most(-1.0, (-1.0, live))
        for reason in reasons:
            rows.at_most(0.0, (1.0, reason), (-1.0, live))
    rows.at_most(free_bytes - every[t].gradient_bytes, *total)


def _solved(rows: _Rows, graph: StepGraph, lower: dict[int, float], upper: dict[int, float]) -> float | None:
    width = len(rows.names)
    cost, whole = np.zeros(width), np.zeros(width)
    for (kind, _, i, _), column in rows.names.items():
        whole[column] = kind in "RS"
        if kind == "R" and not lower[column]:
            cost[column] = graph.ops[i].replay_s
    height, columns, factors = (np.array(part) for part in zip(*rows.entries, strict=True))
    matrix = csr_array((factors, (height, columns)), shape=(len(rows.limits), width))
    least = np.array([lower.get(column, 0.0) for column in range(width)])
    most = np.array([upper.get(column, 1.0) for column in range(width)])
    found = milp(
        cost,
        constraints=LinearConstraint(matrix, ub=np.array(rows.limits)),
        integrality=whole,
        bounds=Bounds(least, most),
        options={"mip_rel_gap": 0.0},
    )
    return None if found.x is None else float(found.fun)
