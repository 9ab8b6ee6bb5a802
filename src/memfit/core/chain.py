"""The fastest way through a chain of segments in a given memory, recomputing in levels where that pays.

Note [The chain]
 1. ``first[s]`` says, for each memory, the least seconds of replay from segment s on, s being entered in the
    forward of the program itself. ``again[s, t]`` is the same for the segments s to t when they are run again
    from the entry of s because the backward of t is next. Memory counts in units, sizes rounded.
 2. A segment is passed in one of two ways. *Choice*: it keeps what one of its choices keeps, and its
    backward replays the rest. *Jump*: only its entry stays; the segments up to a later one are run again
    when the backward gets there, in the same two ways. A jump within a jump is the next level.
 3. The segment for whose backward a stretch is run again keeps nothing: it replays what it needs there.
 4. With the sizes rounded down, the same recursion bounds from below every way through the chain that is
    made of these choices.

Sources: the recursion over "keep the entry or all of it" is that of Rotor (Beaumont et al., arXiv:1911.13214)
and of Revolve (Griewank and Walther, 2000); choices of ops inside a segment in place of "all of it" as in
Rockmate (Zhao et al., arXiv:2307.01236).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from memfit.core.choices import Choice
from memfit.core.segments import Segment

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Link:
    """One segment with its choices and what it takes to run it again.

    Attributes:
        path: The values of the segment's graph from which the entry of the next is made, and that entry.
        again_s: Seconds to make them again.
        everything: The choice that keeps least.
        stuck_bytes: What ``everything`` keeps beside the entry: generator states, results of ops that
            cannot be run again.
    """

    segment: Segment
    choices: tuple[Choice, ...]
    path: frozenset[int]
    again_s: float
    everything: Choice
    stuck_bytes: int


class Way(NamedTuple):
    """How one segment is passed for the last time.

    Attributes:
        choice: What it drops.
        made_for: The segment whose backward its kept values are made for; -1: kept from the forward on.
        entry_for: The same for its entry.
    """

    choice: Choice
    made_for: int
    entry_for: int


class _Stretch(NamedTuple):
    """Segments ``s`` to ``t`` to be passed in some memory; in the forward itself, or run again for ``t``."""

    s: int
    t: int
    memory: int
    is_first: bool


class _Table(NamedTuple):
    """A link's sizes in units; ``least`` is the memory a choice cannot do without."""

    kept: list[int]
    least: list[int]
    seconds: list[float]


class Chain:
    """The tables of one memory; see Note [The chain].

    Args:
        units: How many parts the memory is counted in.
        forward_bytes: What the forward holds in the end beyond what the segments know of; it grows evenly.
        bound: Round sizes down, so that no way through the chain is faster than :meth:`solve` says.

    Cost: about ``links**2 * units`` times the number of choices and of links.
    """

    def __init__(
        self,
        links: Sequence[Link],
        memory_bytes: int,
        units: int,
        *,
        forward_bytes: int = 0,
        bound: bool = False,
    ) -> None:
        self._links = links
        self._units = units
        self._unit_bytes = max(1.0, memory_bytes / units)
        self._forward_bytes = forward_bytes
        self._round: Callable[[float], int] = math.floor if bound else round
        self._tables = [self._table(link, i / max(1, len(links) - 1)) for i, link in enumerate(links)]
        self._again: dict[tuple[int, int], FloatArray] = {}
        self._first: dict[int, FloatArray] = {}

    def _table(self, link: Link, passed: float) -> _Table:
        """The sizes of a link in units; ``passed`` is how much of the chain the forward has behind it."""
        s = link.segment
        peaks = [
            max(
                c.peak_bytes + s.backward_extra_bytes,
                c.forward_peak_bytes + s.forward_extra_bytes + int(self._forward_bytes * passed),
            )
            for c in link.choices
        ]
        return _Table(
            kept=[self._in_units(c.kept_bytes) for c in link.choices],
            least=[self._in_units(max(p, c.kept_bytes)) for p, c in zip(peaks, link.choices, strict=True)],
            seconds=[c.seconds for c in link.choices],
        )

    def _in_units(self, size_bytes: int) -> int:
        return max(0, self._round(size_bytes / self._unit_bytes))

    # ---- tables -------------------------------------------------------------------------------------

    def solve(self) -> float:
        """Fills the tables; the least seconds in all the memory, infinite if nothing fits."""
        last = len(self._links) - 1
        for length in range(1, last + 1):
            for s in range(last - length + 1):
                self._again[s, s + length - 1] = self._run_again(s, s + length - 1)
        for s in range(last, -1, -1):
            self._first[s] = self._enter(s)
        return float(self._first[0][self._units])

    def _never(self) -> FloatArray:
        return np.full(self._units + 1, np.inf)

    def _choose(self, s: int, rest: FloatArray | None) -> FloatArray:
        """The least seconds if a segment takes one of its choices; ``rest`` is what follows it."""
        table, best = self._tables[s], self._never()
        for kept, least, seconds in zip(table.kept, table.least, table.seconds, strict=True):
            if least <= self._units:
                after = 0.0 if rest is None else rest[least - kept : self._units + 1 - kept]
                np.minimum(best[least:], after + seconds, out=best[least:])
        return best

    def _jumps(self, s: int, t: int, is_first: bool) -> Iterator[tuple[int, int, float]]:
        """Where a jump from ``s`` may land, the units it keeps, and the seconds it takes to get there."""
        kept_bytes, run_s = self._links[s].segment.entry_bytes, 0.0
        for nearer in range(s + 1, t + 1):
            link = self._links[nearer - 1]
            kept_bytes += link.stuck_bytes
            run_s += 0.0 if is_first else link.again_s
            kept = self._in_units(kept_bytes)
            if kept > self._units:
                return
            yield nearer, kept, run_s

    def _jump(self, s: int, t: int, is_first: bool) -> FloatArray:
        """The least seconds if only the entry of ``s`` stays, up to some later segment."""
        best = self._never()
        for nearer, kept, run_s in self._jumps(s, t, is_first):
            ahead = self._first[nearer] if is_first else self._again[nearer, t]
            whole = ahead[: self._units + 1 - kept] + self._again[s, nearer - 1][kept:]
            np.minimum(best[kept:], whole + run_s, out=best[kept:])
        return best

    def _run_again(self, s: int, t: int) -> FloatArray:
        """``again[s, t]``."""
        link = self._links[s]
        if s == t:
            best = self._never()
            least = self._tables[s].least[link.choices.index(link.everything)]
            best[least:] = link.everything.seconds
            return best
        chosen = self._choose(s, self._again[s + 1, t]) + link.again_s
        return np.minimum(chosen, self._jump(s, t, False))

    def _enter(self, s: int) -> FloatArray:
        """``first[s]``."""
        last = len(self._links) - 1
        if s == last:
            return self._choose(s, None)
        return np.minimum(self._choose(s, self._first[s + 1]), self._jump(s, last, True))

    # ---- the way back -------------------------------------------------------------------------------

    def least_bytes(self) -> int | None:
        """The least memory in which there is a way; None if there is none."""
        self.solve()
        feasible = np.flatnonzero(np.isfinite(self._first[0]))
        return math.ceil(feasible[0] * self._unit_bytes) if len(feasible) else None

    def ways(self, memory_bytes: int | None = None) -> list[Way]:
        """How each segment is passed in the fastest way; the tables must be solved and feasible."""
        units = self._units if memory_bytes is None else int(memory_bytes / self._unit_bytes)
        found: dict[int, Way] = {}
        entries: dict[int, int] = {}
        pending = [_Stretch(0, len(self._links) - 1, units, True)]
        while pending:
            stretch = pending.pop()
            entries.setdefault(stretch.s, -1 if stretch.is_first else stretch.t)
            pending.extend(self._decide(stretch, entries[stretch.s], found))
        return [found[s] for s in range(len(self._links))]

    def _decide(self, stretch: _Stretch, entry_for: int, found: dict[int, Way]) -> list[_Stretch]:
        """Decides the first segment of a stretch; returns the stretches that remain."""
        s, t, memory, is_first = stretch
        link, table = self._links[s], self._tables[s]
        if s == t and not is_first:
            found[s] = Way(link.everything, t, entry_for)
            return []
        options: list[tuple[float, int, int, int]] = []
        again_s = 0.0 if is_first else link.again_s
        for i, (kept, least, seconds) in enumerate(zip(*table, strict=True)):
            if least <= memory:
                ahead_s = self._ahead_s(s + 1, t, memory - kept, is_first) if s < t else 0.0
                options.append((ahead_s + seconds + again_s, 0, i, kept))
        for nearer, kept, run_s in self._jumps(s, t, is_first):
            if kept <= memory:
                behind_s = float(self._again[s, nearer - 1][memory])
                ahead_s = self._ahead_s(nearer, t, memory - kept, is_first)
                options.append((ahead_s + behind_s + run_s, 1, nearer, kept))
        _, is_jump, which, kept = min(options)
        if is_jump:
            return [_Stretch(s, which - 1, memory, False), _Stretch(which, t, memory - kept, is_first)]
        found[s] = Way(link.choices[which], -1 if is_first else t, entry_for)
        return [_Stretch(s + 1, t, memory - kept, is_first)] if s < t else []

    def _ahead_s(self, s: int, t: int, memory: int, is_first: bool) -> float:
        """Seconds of what follows."""
        return float((self._first[s] if is_first else self._again[s, t])[memory])
