"""What one segment of a chain can do: sets of values to drop, each with its memory and its seconds.

Note [Choices]
 1. A few numbers make a choice: bytes it keeps when the forward has left the segment, its own peaks in
    forward and backward, what it cannot save before the whole forward is over, and seconds of replay. A
    choice that another one beats in all of them is left out.
 2. They are found by the program of ``core/milp.py`` on the segment's graph, with a price on each kept byte:
    the lower hull of seconds over bytes, corner by corner, under a few limits of the peak. Under many more
    limits, what keeps least: the smallest memory that works is made of those.
 3. The numbers are not the program's but the simulation's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from memfit.core.milp import Program
from memfit.core.segments import Segment, held_until_then, kept_after_forward, peaks_of
from memfit.core.timeline import run

_LIMITS = 3  # of the peak, between the least and what the fastest choice takes
_FINE_LIMITS = 24  # under which only the least kept bytes are looked for
_DEPTH = 3  # of the search for corners of the hull: at most 2**_DEPTH + 1 under each limit
_WINDOW = 12
_ANY_PRICE_S = 1.0  # of a byte: so dear that as little is kept as can be


@dataclass(frozen=True, slots=True)
class Choice:
    """A set of values of a segment's graph to drop, and what that means.

    ``held_bytes`` are there beside the kept ones until the whole forward is over, more than without dropping.
    """

    dropped: frozenset[int]
    kept_bytes: int
    peak_bytes: int
    forward_peak_bytes: int
    held_bytes: int
    seconds: float


def read_choices(segment: Segment, alignment_bytes: int) -> tuple[Choice, ...]:
    """The choices of a segment, the most bytes first; at least to keep everything."""
    search = _Search(segment, alignment_bytes)
    search.try_all([frozenset()])
    if not search.program.closure(set()):
        return search.best()
    search.try_all([search.program.closure(set()), search.program.least()])
    plain = search.found[frozenset()]
    lowest = min(choice.peak_bytes for choice in search.found.values())
    between = plain.peak_bytes - lowest
    for limit in (None, *_limits(lowest, between, _LIMITS)):
        search.corners(limit)
    for limit in _limits(lowest, between, _FINE_LIMITS):
        search.try_all(search.program.priced(limit, _ANY_PRICE_S))
    return search.best()


def _limits(lowest_bytes: int, between_bytes: int, number: int) -> list[int]:
    """Limits at equal distances, neither end among them."""
    return [lowest_bytes + between_bytes * i // (number + 1) for i in range(1, number + 1)]


def tried_choices(
    segment: Segment, candidates: Iterable[frozenset[int]], alignment_bytes: int
) -> tuple[Choice, ...]:
    """The choices of a segment among sets that were found for one of the same shape."""
    search = _Search(segment, alignment_bytes)
    search.try_all(candidates)
    return search.best()


class _Search:
    """The choices of one segment found so far."""

    def __init__(self, segment: Segment, alignment_bytes: int) -> None:
        self.segment = segment
        self.alignment_bytes = alignment_bytes
        self.found: dict[frozenset[int], Choice] = {}
        plain = run(segment.graph, alignment_bytes=alignment_bytes)
        self.plain_held_bytes = held_until_then(segment, plain)

    @cached_property
    def program(self) -> Program:
        """The program of the segment's graph."""
        return Program(
            self.segment.graph,
            alignment_bytes=self.alignment_bytes,
            window=_WINDOW,
        )

    def try_all(self, candidates: Iterable[frozenset[int]]) -> None:
        """Simulates choices."""
        for dropped in candidates:
            self.simulated(dropped)

    def simulated(self, dropped: frozenset[int]) -> Choice:
        """A choice with the simulation's numbers."""
        if dropped not in self.found:
            graph = self.segment.graph
            own = run(graph, dropped, alignment_bytes=self.alignment_bytes)
            forward_peak_bytes, peak_bytes = peaks_of(self.segment, own)
            self.found[dropped] = Choice(
                dropped,
                kept_after_forward(self.segment, own),
                peak_bytes,
                forward_peak_bytes,
                held_until_then(self.segment, own) - self.plain_held_bytes,
                sum(graph.ops[op].replay_s for op in own.replayed_ops),
            )
        return self.found[dropped]

    def corners(self, limit_bytes: int | None) -> None:
        """The corners of the hull of seconds over kept bytes, under a limit of the peak."""
        dearest = self.program.priced(limit_bytes, _ANY_PRICE_S)
        fastest = [frozenset[int]()] if limit_bytes is None else self.program.priced(limit_bytes, 0.0)
        if dearest and fastest:
            less, more = self.cheapest(dearest, _ANY_PRICE_S), self.cheapest(fastest, 0.0)
            self._between(limit_bytes, more, less, _DEPTH)

    def cheapest(self, candidates: list[frozenset[int]], price_s: float) -> Choice:
        """The best of several at a price; all are remembered."""
        return min((self.simulated(c) for c in candidates), key=lambda c: c.seconds + price_s * c.kept_bytes)

    def _between(self, limit_bytes: int | None, more: Choice, less: Choice, depth: int) -> None:
        """Corners between two: the choice farthest below the line through them, and so on."""
        if depth == 0 or more.kept_bytes <= less.kept_bytes or less.seconds <= more.seconds:
            return
        price_s = (less.seconds - more.seconds) / (more.kept_bytes - less.kept_bytes)
        candidates = self.program.priced(limit_bytes, price_s)
        if not candidates:
            return
        middle = self.cheapest(candidates, price_s)
        if middle.seconds + price_s * middle.kept_bytes >= more.seconds + price_s * more.kept_bytes - 1e-12:
            return
        self._between(limit_bytes, more, middle, depth - 1)
        self._between(limit_bytes, middle, less, depth - 1)

    def best(self) -> tuple[Choice, ...]:
        """The choices that no other one beats in everything."""
        ordered = sorted(
            self.found.values(), key=lambda c: (c.seconds, c.kept_bytes, c.peak_bytes, len(c.dropped))
        )
        kept: list[Choice] = []
        for choice in ordered:
            if not any(
                o.kept_bytes <= choice.kept_bytes
                and o.peak_bytes <= choice.peak_bytes
                and o.forward_peak_bytes <= choice.forward_peak_bytes
                and o.held_bytes <= choice.held_bytes
                for o in kept
            ):
                kept.append(choice)
        return tuple(kept)
