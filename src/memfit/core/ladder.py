"""Plans of a chain on a fixed ladder of memories, so that more memory is never slower.

Note [The ladder]
 1. Solving for the very budget that was asked for is a little better here and a little worse there, so a larger
    budget could end with a slower plan. The plans of a ladder do not depend on the budget: each *rung* is what
    the chain proposes for some memory. The answer is the fastest rung that really fits, of equally fast ones
    that of least peak. More memory only adds rungs, and a rung it adds peaks above the smaller budget.
 2. One table of the chain answers for all memories below its own, so the rungs are the steps of few tables: one
    for all the memory that the step would take, one for half of it, and so on to the least; one more is fine
    there.
 3. Few rungs are ever looked at: those a little above the budget (sizes were rounded), and from there down to
    the first that fits. A lower one takes as many seconds as its table says or more, that is, longer.
 4. Where a proposal overshoots by much, half of that is skipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from memfit.core.chain import Chain, FloatArray, Link
from memfit.core.graph import Level
from memfit.core.links import levels_of

_ABOVE = 0.003  # of the budget: proposals for so much more may fit it all the same
_STRIDE = 2  # units from one rung to the next, at least
_NEAR = 8  # units of overshoot below which no rung is skipped
_LEAST = 1.1  # of the least memory: where the last table begins
_OVERLAP = 0.99  # of where the next table begins, in case it finds no way there


class Judged(NamedTuple):
    """A choice of values to drop, as the simulation sees it."""

    dropped: Mapping[int, Level]
    peak_bytes: int
    seconds: float


class _Table:
    """A chain solved in some memory, and its least seconds by unit of it."""

    def __init__(self, links: Sequence[Link], memory_bytes: float, units: int, *, bound: bool) -> None:
        self.chain = Chain(links, memory_bytes, units, bound=bound)
        self.seconds = self.chain.solve()
        self.memory_bytes = memory_bytes
        self.unit_bytes = memory_bytes / units
        feasible = np.flatnonzero(np.isfinite(self.seconds))
        self.least_unit = int(feasible[0]) if len(feasible) else None

    @property
    def last_bytes(self) -> float | None:
        """The memory of one more table, the last; None if the next has half the memory, or there is none."""
        if self.least_unit is None or 2 * self.least_unit <= len(self.seconds) - 1:
            return None
        return min(self.memory_bytes, _LEAST * (self.least_unit + 1) * self.unit_bytes)

    def steps(self, low_bytes: float, high_bytes: float) -> Iterator[int]:
        """The least unit of each step of the table between two memories, the highest first."""
        unit = min(len(self.seconds) - 1, int(high_bytes / self.unit_bytes))
        while self.least_unit is not None and unit >= self.least_unit and unit * self.unit_bytes > low_bytes:
            unit -= unit % _STRIDE
            if not math.isfinite(self.seconds[unit]):
                return
            # The table falls as memory grows: the first unit with no more seconds than this one.
            step = int(np.argmax(self.seconds <= self.seconds[unit]))
            yield step
            unit = step - 1


class Ladder:
    """The rungs of one chain. See Note [The ladder].

    Args:
        most_bytes: The peak without any recomputation.
        units: How finely each table counts memory.
        judge: Simulates a choice.
    """

    def __init__(
        self,
        links: Sequence[Link],
        most_bytes: int,
        units: int,
        judge: Callable[[Mapping[int, Level]], Judged],
    ) -> None:
        self._links = links
        self._most_bytes = most_bytes
        self._units = units
        self._judge = judge
        self._tables: dict[tuple[float, bool], _Table] = {}
        self._judged: dict[tuple[float, int], Judged] = {}

    def bound_s(self, free_bytes: int) -> float:
        """No way through the chain within some memory takes fewer seconds; infinite if there is none."""
        *_, table = (t for t, _ in self._tables_from(free_bytes, bound=True) if t.memory_bytes >= free_bytes)
        return float(table.seconds[min(self._units, math.ceil(free_bytes / table.unit_bytes))])

    def best(self, free_bytes: int) -> Judged | None:
        """The fastest rung that fits, None if none does."""
        best: Judged | None = None
        skipped_to = math.inf
        for table, unit in self._rungs(free_bytes * (1 + _ABOVE)):
            memory_bytes = unit * table.unit_bytes
            if best is not None and table.seconds[unit] >= best.seconds:
                break
            if memory_bytes > skipped_to:
                continue
            rung = self._rung(table, unit)
            over_bytes = rung.peak_bytes - free_bytes
            if over_bytes > _NEAR * table.unit_bytes:
                skipped_to = memory_bytes - over_bytes / 2
            elif over_bytes <= 0 and (best is None or (rung.seconds, rung.peak_bytes) < best[1:][::-1]):
                best = rung
        return best or next((rung for rung in self.least() if rung.peak_bytes <= free_bytes), None)

    def least(self) -> list[Judged]:
        """The lowest rungs of the last two tables, one of which peaks lowest as far as is known: it is first."""
        tables = [table for table, _ in self._tables_from(self._most_bytes)][-2:]
        found = [self._rung(table, table.least_unit) for table in tables if table.least_unit is not None]
        return sorted(found, key=lambda rung: (rung.peak_bytes, rung.seconds))

    def _rungs(self, limit_bytes: float) -> Iterator[tuple[_Table, int]]:
        """The rungs below a memory, the highest first."""
        for table, low_bytes in self._tables_from(limit_bytes):
            for unit in table.steps(low_bytes, limit_bytes):
                yield table, unit

    def _rung(self, table: _Table, unit: int) -> Judged:
        """One rung, simulated."""
        key = table.memory_bytes, unit
        if key not in self._judged:
            self._judged[key] = self._judge(levels_of(self._links, table.chain.ways(unit)))
        return self._judged[key]

    def _tables_from(self, memory_bytes: float, *, bound: bool = False) -> Iterator[tuple[_Table, float]]:
        """The tables for some memory and for less, each with the memory down to which its rungs count."""
        halvings = max(0, math.floor(math.log2(self._most_bytes / memory_bytes)))
        while True:
            table = self._table(self._most_bytes / 2**halvings, bound)
            last_bytes = table.last_bytes
            if last_bytes is not None:
                yield table, last_bytes
                yield self._table(last_bytes, bound), 0.0
                return
            yield table, _OVERLAP * table.memory_bytes / 2
            if table.least_unit is None:
                return
            halvings += 1

    def _table(self, memory_bytes: float, bound: bool) -> _Table:
        """A table, solved once."""
        key = memory_bytes, bound
        if key not in self._tables:
            self._tables[key] = _Table(self._links, memory_bytes, self._units, bound=bound)
        return self._tables[key]
