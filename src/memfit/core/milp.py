"""Chooses which values to keep and which to replay: a mixed integer program for HiGHS.

Note [The program]
 Symbols: v value, o op, g slot (see Note [Slots]), p moment.
 1. ``keep[v]`` is 1 if v is held from the forward on. ``made[o, g]`` is 1 if o has been replayed by slot g;
    it never falls. An op is replayed at most once, not earlier than ``window`` slots before its own
    backward, and not later than the last moment anything could need it.
 2. Need: a save of v first unpacked in slot g demands ``keep[v] + made[producer(v), g] >= 1``.
 3. Reach: replaying o by slot g demands the same of each of its inputs.
 4. Memory: at each moment p that can be the peak, the natural bytes and what the plan adds are at most the
    budget: kept values the program has let go of and the backward has not released, and replayed ones.
    The rows are built from their changes from one moment to the next, which are few, and added up.
 5. Cost: the seconds of the ops replayed by the end.
 Only ``keep`` is integer: given it, the least ``made`` is integral by itself.
 6. *Certain* flows count only what is alive under every choice with these columns, so that their
    relaxation bounds every choice from below. *Expected* flows count also what probably is. Neither sees
    what lives within one replay: ``core/plan.py`` lets ``core/timeline.py`` judge, and corrects.

Source: retention intervals are those of Moccasin (arXiv:2304.14463), cut at backward moments, in place
of Checkmate's per-op schedule (arXiv:1910.02653), whose relaxation is weak.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp
from scipy.sparse import csr_array, hstack, tril

from memfit.core.graph import StepGraph
from memfit.core.moments import read_moments

FloatArray = NDArray[np.float64]

# The tree is cut by its size, so that a plan does not depend on the machine; time only guards against hangs.
_LIMITS = {"node_limit": 1, "time_limit": 120.0}

_PARTS = (0.05, 0.5, 0.95)  # of a value that a relaxation must keep for it to be kept


@dataclass(slots=True)
class _Rows:
    """Sparse rows under construction; entries of one place add up."""

    rows: list[int] = field(default_factory=list)
    columns: list[int] = field(default_factory=list)
    coefficients: list[float] = field(default_factory=list)
    lower: list[float] = field(default_factory=list)

    def put(self, row: int, column: int, coefficient: float) -> None:
        """One entry."""
        self.rows.append(row)
        self.columns.append(column)
        self.coefficients.append(coefficient)

    def add(self, terms: list[tuple[int, float]], lower: float) -> None:
        """One more row: the sum of the terms is at least ``lower``."""
        for column, coefficient in terms:
            self.put(len(self.lower), column, coefficient)
        self.lower.append(lower)

    def matrix(self, height: int, width: int) -> csr_array:
        """The rows as a matrix."""
        return csr_array((self.coefficients, (self.rows, self.columns)), shape=(height, width))


class Program:
    """The program of one graph, built once; :meth:`solve` takes the budget. See Note [The program]."""

    def __init__(self, graph: StepGraph, *, alignment_bytes: int, window: int) -> None:
        self._graph = graph
        self._moments = read_moments(graph, alignment_bytes=alignment_bytes, window=window)
        self._number_columns()
        self._unit_bytes = max([1, *self._moments.sizes])
        self._needs = self._need_rows()
        self._expected = self._flow(certain=False)
        self._certain = self._flow(certain=True)

    # ---- columns ------------------------------------------------------------------------------------

    def _number_columns(self) -> None:
        """``keep`` columns first, then ``made`` op by op."""
        moments = self._moments
        wanted = set(moments.first_need) | {v for v, readers in moments.readers.items() if readers}
        self._keep = {value: column for column, value in enumerate(sorted(wanted))}
        self._made_from: dict[int, int] = {}
        column = len(self._keep)
        for op in sorted(moments.late):
            self._made_from[op] = column
            column += moments.late[op] - moments.early[op] + 1
        self._width = column

    def _made(self, op: int, slot: int) -> int | None:
        """The column that says whether an op has been replayed by a slot; None: never so early."""
        if op not in self._made_from or slot < self._moments.early[op]:
            return None
        return self._made_from[op] + min(slot, self._moments.late[op]) - self._moments.early[op]

    # ---- rows ---------------------------------------------------------------------------------------

    def _have(self, value: int, slot: int) -> list[tuple[int, float]]:
        """Terms whose sum is at least 1 if a value is there in a slot."""
        droppable = value in self._moments.droppable
        column = self._made(self._graph.values[value].producer, slot) if droppable else None
        kept = [(self._keep[value], 1.0)]
        return kept if column is None else [*kept, (column, 1.0)]

    def _need_rows(self) -> _Rows:
        """Rules 1 to 3."""
        rows, moments = _Rows(), self._moments
        for value, slot in moments.first_need.items():
            rows.add(self._have(value, slot), 1.0)
        for op, first in self._made_from.items():
            early = moments.early[op]
            for slot in range(early, moments.late[op] + 1):
                column = first + slot - early
                if slot > early:
                    rows.add([(column, 1.0), (column - 1, -1.0)], 0.0)
                for value in self._graph.ops[op].inputs:
                    rows.add([*self._have(value, slot), (column, -1.0)], 0.0)
        return rows

    def _flow(self, *, certain: bool) -> csr_array:
        """Rule 4: the bytes the plan adds at each moment."""
        rows, moments = _Rows(), self._moments
        positions = [peak.position for peak in moments.peaks]
        slots = [peak.slot for peak in moments.peaks]
        lasts = {v: bisect.bisect_right(positions, moments.ending(v, certain=certain)) for v in self._keep}
        for value, column in self._keep.items():
            storage = self._graph.values[value].storage
            first = bisect.bisect_right(positions, moments.freed_at[storage])
            self._alive(rows, value, [(first, column)], lasts[value])
        for op in self._made_from:
            for value in self._graph.ops[op].outputs:
                if certain or value in moments.released_at:
                    last = bisect.bisect_right(positions, moments.released_at.get(value, -1))
                    self._made_alive(rows, op, value, slots, last if certain else lasts.get(value, 0))
                    if certain and len(self._graph.ops[op].outputs) > 1 and value in self._keep:
                        # Replayed for a sibling while kept itself: the copy is not retained.
                        first = bisect.bisect_left(slots, moments.early[op])
                        self._alive(rows, value, [(first, self._keep[value])], last, sign=-1.0)
                elif moments.readers[value]:
                    reader = max(moments.readers[value], key=lambda r: moments.late[r])
                    last = bisect.bisect_right(slots, moments.late[reader])
                    self._made_alive(rows, op, value, slots, last)
                    self._made_alive(rows, reader, value, slots, last, sign=-1.0)
        changes = rows.matrix(len(positions), self._width)
        added = csr_array(tril(np.ones((len(positions),) * 2))) @ changes
        added.data[np.abs(added.data) < 1e-9] = 0.0  # what ended leaves a rounding error
        added.eliminate_zeros()
        return added

    def _made_alive(
        self, rows: _Rows, op: int, value: int, slots: list[int], last: int, *, sign: float = 1.0
    ) -> None:
        """A value lives, in row after row up to ``last``, by as much as its op has been replayed."""
        early, late = self._moments.early[op], self._moments.late[op]
        changes: dict[int, int] = {}
        for slot in range(early, late + 1):
            changes[bisect.bisect_left(slots, slot)] = self._made_from[op] + slot - early
        self._alive(rows, value, sorted(changes.items()), last, sign=sign)

    def _alive(
        self, rows: _Rows, value: int, changes: list[tuple[int, int]], last: int, *, sign: float = 1.0
    ) -> None:
        """A value's bytes count by the column of the last change, from the first change up to ``last``."""
        size = sign * self._moments.sizes[self._graph.values[value].storage] / self._unit_bytes
        before: int | None = None
        for row, column in changes:
            if row >= last:
                break
            rows.put(row, column, size)
            if before is not None:
                rows.put(row, before, -size)
            before = column
        if before is not None and last < len(self._moments.peaks):
            rows.put(last, before, -size)

    # ---- solving ------------------------------------------------------------------------------------

    def bound_s(self, budget_bytes: int) -> float | None:
        """Seconds that every choice within a budget recomputes at least; None if none can exist."""
        result = self._milp(self._certain, budget_bytes)
        return None if result.x is None else max(0.0, float(result.fun))

    def relax(self, budget_bytes: int) -> list[float] | None:
        """How much of each value (by column) the relaxation keeps; None if it is infeasible."""
        result = self._milp(self._expected, budget_bytes)
        return None if result.x is None else [round(float(part), 6) for part in result.x[: len(self._keep)]]

    def wishes(self, relaxed: list[float]) -> list[int]:
        """The values in the order in which a relaxation wants them kept, dearest per byte first."""
        return sorted(self._keep, key=lambda value: (-relaxed[self._keep[value]], -self._density(value)))

    def _density(self, value: int) -> float:
        """Seconds of replay that a kept byte saves."""
        seconds = self._graph.ops[self._graph.values[value].producer].seconds
        return seconds / max(1, self._graph.size_bytes(value))

    def solve(self, budget_bytes: int, relaxed: list[float], *, gap: float) -> frozenset[int] | None:
        """The values to drop in the cheapest choice found; None if none was.

        Only values that the relaxation keeps at least in part may be kept: that leaves few, and
        measured on transformers it costs at most 0.5 % of a forward.

        Args:
            gap: Stop when no choice can be cheaper by more than this part of the cost.
        """
        allowed = np.array([float(part > 0) for part in relaxed])
        result = self._milp(self._expected, budget_bytes, gap=gap, allowed=allowed)
        return None if result.x is None else self.closure(self._kept(result.x))

    def priced(self, budget_bytes: int | None, price_s: float) -> list[frozenset[int]]:
        """Sets of values to drop where each byte kept at the end of the forward costs ``price_s`` seconds.

        Without a budget the program is solved; with one its relaxation is rounded in a few ways, which takes
        a tenth of the time and misses as little as the first branch of the tree would.

        Args:
            budget_bytes: Of the peak; None: any.
        """
        prices = np.append(price_s * self._kept_bytes(), np.zeros(self._width - len(self._keep)))
        if budget_bytes is None:
            everything = np.ones(len(self._keep))
            result = self._milp(self._expected[:0], 0, gap=1e-4, allowed=everything, prices=prices)
            return [] if result.x is None else [self.closure(self._kept(result.x))]
        result = self._milp(self._expected, budget_bytes, prices=prices)
        if result.x is None:
            return []
        return [
            self.closure({v for v, column in self._keep.items() if result.x[column] > part})
            for part in _PARTS
        ]

    def _kept_bytes(self) -> FloatArray:
        """What each value adds to the end of the forward if it is kept."""
        moments = self._moments
        end = moments.slots[0] if moments.slots else 0
        return np.array(
            [
                float(moments.sizes[storage]) * (moments.freed_at[storage] < end)
                for storage in (self._graph.values[value].storage for value in self._keep)
            ]
        )

    def least(self) -> frozenset[int]:
        """The values to drop so that the peak is lowest, whatever that costs."""
        result = self._milp(self._expected, None, gap=2e-2, allowed=np.ones(len(self._keep)))
        return self.closure(set() if result.x is None else self._kept(result.x))

    def closure(self, kept: set[int]) -> frozenset[int]:
        """The values to drop if only these are kept: what else is saved, and what replaying it takes."""
        dropped: set[int] = set()
        droppable = self._moments.droppable
        stack = [v for v in self._moments.first_need if v not in kept and v in droppable]
        while stack:
            value = stack.pop()
            if value not in dropped:
                dropped.add(value)
                inputs = self._graph.ops[self._graph.values[value].producer].inputs
                stack.extend(v for v in inputs if v not in kept and v in droppable)
        return frozenset(dropped)

    def _milp(
        self,
        flow: csr_array,
        budget_bytes: int | None,
        *,
        gap: float = 0.0,
        allowed: FloatArray | None = None,
        prices: FloatArray | None = None,
    ) -> OptimizeResult:
        """Hands the program to HiGHS; without ``allowed`` its relaxation, without a budget the least peak."""
        cost = self._costs() if prices is None else self._costs() + prices
        unit_s = max(float(cost.max(initial=0.0)), 1e-12)
        natural = np.array([p.natural_bytes for p in self._moments.peaks]) / self._unit_bytes
        natural = natural[: flow.shape[0]]
        width = self._width + 1  # one more column: the peak, where it is the objective
        needs = self._needs.matrix(len(self._needs.lower), width)
        peak = csr_array(np.full((len(natural), 1), float(budget_bytes is None)))
        free = 0.0 if budget_bytes is None else budget_bytes / self._unit_bytes
        if np.any(natural > free) and budget_bytes is not None:
            return OptimizeResult(x=None, fun=None)
        upper = np.append(np.ones(self._width), np.inf)
        upper[: len(self._keep)] = self._keepable() * (1.0 if allowed is None else allowed)
        if budget_bytes is None:
            objective = np.append(cost / max(float(cost.sum()), 1e-12) * 1e-3, 1.0)
        else:
            objective = np.append(cost / unit_s, 0.0)
        result = milp(
            objective,
            constraints=[
                LinearConstraint(needs, np.array(self._needs.lower)),
                LinearConstraint(hstack([-flow, peak], format="csr"), natural - free),
            ],
            integrality=np.arange(width) < (0 if allowed is None else len(self._keep)),
            bounds=Bounds(0.0, upper),
            options=_LIMITS | {"mip_rel_gap": gap},
        )
        if result.fun is not None:
            result.fun *= unit_s
        return result

    def _costs(self) -> FloatArray:
        """Rule 5, for all columns but the peak's."""
        cost = np.zeros(self._width)
        for op, first in self._made_from.items():
            column = first + self._moments.late[op] - self._moments.early[op]
            cost[column] = self._graph.ops[op].replay_s
        return cost

    def _keepable(self) -> FloatArray:
        """A version that is overwritten cannot be kept."""
        return np.array([float(not self._graph.values[v].is_overwritten) for v in self._keep])

    def _kept(self, x: FloatArray) -> set[int]:
        """The values a solution keeps."""
        return {v for v, column in self._keep.items() if x[column] > 0.5}
