"""The effective batch of all ranks: what each part of it weighs, whichever rank has it.

Note [Global weights]
 1. Ranks count their own rows of the batch and tell each other, once a step, in the meeting that opens it. A
    part weighs what it counts over what all ranks count: a mean of the ranks' means would be another loss
    wherever they differ. A rank may have nothing to count; all together may not.
 2. What a counter counts in a batch must be the sum over its parts, whichever way they are cut.
 3. Where gradients are averaged over the ranks, weights are times their number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from memfit.core.batching import parts_for
from memfit.errors import InexactAccumulation
from memfit.runtime.batch import rows_of
from memfit.runtime.count import Counter, Weigher, counts_of, nothing_to_count, one
from memfit.runtime.micro import Weight
from memfit.runtime.replicas import Engine

_SAME = 1e-9  # relative difference of numbers that are the same


class Way(NamedTuple):
    """How a step is run: under the meter, by the clock, or neither."""

    is_metered: bool = False
    is_timed: bool = False


@dataclass(frozen=True, slots=True)
class Effective:
    """The batch of one step on all ranks.

    Attributes:
        rows: Of each rank.
        totals: What each counter counts in the batches of all ranks.
        own: What it counts in that of this one.
        way: How the step is run on at least one rank.
    """

    counters: Mapping[str, Counter]
    rows: tuple[int, ...]
    totals: tuple[float, ...]
    own: tuple[float, ...]
    averages: int
    way: Way

    def parts(self, micro_batch_size: int) -> int:
        """The most micro-batches that a rank needs."""
        return max(len(parts_for(rows, min(rows, micro_batch_size))) for rows in self.rows)

    def weights(self, parts: Sequence[Any]) -> list[Weight]:
        """The weight of each part of this rank.

        Raises:
            ValueError: A counter does not count in the parts what it counts in all of them.
        """
        columns = {
            name: self._weights(name, counter, parts, total, own)
            for (name, counter), total, own in zip(self.counters.items(), self.totals, self.own, strict=True)
        }
        if [*columns] == [""]:
            return [*columns[""]]
        return [{name: column[part] for name, column in columns.items()} for part in range(len(parts))]

    def _weights(
        self, name: str, counter: Counter, parts: Sequence[Any], total: float, own: float
    ) -> list[float]:
        """The weights under one counter."""
        if counter is one:
            return [float(self.averages)] * len(parts)
        counts = counts_of(counter, parts, name)
        if not math.isclose(sum(counts), own, rel_tol=_SAME):
            raise ValueError(
                f"count gave {own} for a rank's batch and {counts} for its micro-batches: what is counted "
                "must add up"
            )
        return [count / total * self.averages for count in counts]


def open_batch(
    engine: Engine,
    counter: Counter | Mapping[str, Counter] | None,
    batch: Any,
    way: Way,
    failure: Exception | None,
) -> Effective:
    """The meeting that opens a step on all ranks.

    Args:
        failure: What has gone wrong on this rank before.

    Raises:
        Exception: What went wrong on the lowest rank where something did.
        ValueError: There is nothing to count in the whole batch.
        InexactAccumulation: Two ways to count that were alike so far differ, or none is known.
    """
    known = counter.known if isinstance(counter, Weigher) else counter
    counters = dict(known) if isinstance(known, Mapping) else {} if known is None else {"": known}
    pairs = counter.alike if isinstance(counter, Weigher) else []
    wanted = [*counters.items(), *(("", c) for pair in pairs for c in (pair.counter, pair.other))]
    own = [0.0] * len(wanted)
    rows = 0
    try:
        if failure is None:
            _refuse_no_counter(counters)
            rows = rows_of(batch)
            own = [counts_of(count, [batch], name)[0] for name, count in wanted]
    except Exception as error:
        failure = error
    try:
        table = engine.ranks.table([rows, *way, *own], failure)
    finally:
        del failure  # it holds this frame, and this frame would hold it
    several, *columns = zip(*table, strict=True)
    metered, timed, *counted = columns
    for name, counts in zip(counters, counted, strict=False):
        if not sum(counts):
            raise nothing_to_count(name)
    for number, pair in enumerate(pairs):
        at = len(counters) + 2 * number
        if _differ(counted[at], counted[at + 1]):
            raise pair.refusal()
    return Effective(
        counters,
        tuple(map(int, several)),
        tuple(map(sum, counted[: len(counters)])),
        tuple(own[: len(counters)]),
        engine.averages,
        Way(any(metered), any(timed)),
    )


def _refuse_no_counter(counters: Mapping[str, Counter]) -> None:
    """Refuses a batch of several ranks where nobody knows what its loss is a mean over.

    Raises:
        InexactAccumulation: There is no counter.
    """
    if not counters:
        raise InexactAccumulation(
            "the batches of several ranks cannot be added up: it is not known what the loss is a mean over: "
            "fit again, or say it with count=",
            owner="loss_fn",
        )


def _differ(own: Sequence[float], others: Sequence[float]) -> bool:
    """Whether two ways to count give the ranks other shares."""
    whole, other = sum(own), sum(others)
    return any(
        not math.isclose(a * other, b * whole, rel_tol=_SAME) for a, b in zip(own, others, strict=True)
    )
