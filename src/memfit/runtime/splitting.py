"""Whether a batch may be split, and what each part weighs then: as the user said, or as an audit proves.

Note [Splitting]
 1. A count that was given is taken at its word. ``"auto"`` asks ``runtime/audit.py``, once, and only when
    parts are wanted: at once where the micro-batch is pinned; else when the best plan splits the batch or
    none fits; else when a batch comes that is larger than the one planned whole. Doing nothing costs nothing.
 2. What is not proved stays whole, and the refusal says why.
 3. Counters may count alike in all that the audit saw. A batch in which their shares differ is refused, since
    nobody knows which of them the loss is a mean over.
 4. The audit is stored with the profile and holds as long. Its counters are looked up by name again, for they
    may stand for what a loss closes over; where one is not found, the audit is made again.
 5. Ranks count in one meeting, so all count by the same counters: of those that count alike, only what every
    rank can count in its own rows stays. What one rank cannot count, the loss of all is no mean over.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from memfit.core.audit import SUM, Audit, Kind
from memfit.core.basis import what_changed
from memfit.core.graph import Profile
from memfit.core.plan import Plan, find_plan
from memfit.errors import InexactAccumulation, InfeasibleBudget
from memfit.runtime.audit import KEEP_WHOLE, LARGEST_COPY_BYTES, cures, undecided
from memfit.runtime.basis import basis_of
from memfit.runtime.batch import map_tensors, rows_of, tensors_of
from memfit.runtime.count import Alike, Counter, Weigher, counter_named, shares, weights
from memfit.runtime.job import Job
from memfit.runtime.meter import resident_bytes
from memfit.runtime.micro import Weight
from memfit.runtime.normalisation import by_rows
from memfit.runtime.ranks import Ranks
from memfit.runtime.rescue import is_out_of_memory
from memfit.runtime.sample import has_lists
from memfit.runtime.terms import audit_terms
from memfit.runtime.units import known_counters

_log = logging.getLogger("memfit")

_LEAST_COPY_BYTES = 64 << 20  # a smaller limit saves nothing that matters
_LEAST_ROWS = 3  # of a batch that an audit can decide
_SAME = 1e-9  # relative difference of shares that are the same


class Splitting(Weigher):
    """How a job's batches are split. See Note [Splitting].

    Attributes:
        audit: What was found out; None where nothing had to be.
    """

    def __init__(
        self,
        job: Job,
        count: str | Counter | Mapping[str, str | Counter],
        *,
        limit_bytes: int,
        stored: Profile | None = None,
        audit: Audit | None = None,
    ) -> None:
        """Takes the audit of a stored profile if that still holds. The job's batch is not kept.

        Raises:
            ValueError: ``count`` is no known name.
        """
        self.audit = audit if job.is_two_pass else None
        self._given = None if job.is_two_pass else counter_named(count)
        self._job = job._replace(batch=None)
        self._limit_bytes = limit_bytes
        self.known = self._given
        self._pairs: list[Alike | None] = []  # one for each that the audit names, None where it is not known
        self._barred: str | None = None
        self._bars = ""
        if audit is not None and not job.is_two_pass:
            self._take(audit, job.batch)
        elif self._given is None and stored is not None and _holds(stored, job):
            assert stored.audit is not None
            self._take(stored.audit, job.batch)
            if self.known is None and stored.audit.is_exact:
                self.audit = None  # its counter is not found: ask again

    @property
    def alike(self) -> list[Alike]:
        """The counters in use, each with another one that has counted like it."""
        return [pair for pair in self._pairs if pair is not None]

    def bar(self, owner: str, reason: str) -> None:
        """From now on every batch stays whole."""
        self._barred = reason
        self._bars = owner

    @property
    def is_two_pass(self) -> bool:
        """Whether the loss is taken on the outputs of all parts, so that none has a weight."""
        return self._job.is_two_pass and self._barred is None

    @property
    def counter(self) -> Counter | Mapping[str, Counter] | None:
        """What parts are weighted by: what was given, or this, which finds it out; None: nothing may be."""
        if self._barred is not None or self._job.is_two_pass:
            return None
        return self._given or self

    def demand(self, batch: Any, micro_batch_size: int) -> None:
        """Proves that a batch may be split into such parts.

        Raises:
            InexactAccumulation: It may not be.
            Exception: What the loss raised on a few rows of it.
        """
        if self.is_two_pass:
            return
        if self._barred is None and self.known is None and self.audit is None:
            self._take(self._audited(batch), batch)
        if self._barred is not None or self.known is None:
            raise self._refusal(f"micro-batches of {micro_batch_size} of {rows_of(batch)} rows")

    def refuse_ranks(self, profile: Profile, batch: Any, ranks: int) -> None:
        """Proves that a batch may be one of several ranks', which are parts of a larger one.

        Raises:
            InexactAccumulation: It may not be.
        """
        if not self.is_two_pass and self._barred is None and self.known is None and self.audit is None:
            self._prove(batch)
        ways: tuple[str, ...] = ()
        if self.is_two_pass:
            why, owner = "the loss couples rows, and each rank sees its own only", "loss_fn"
        elif self._barred is not None:
            why, owner, ways = self._barred, self._bars, cures(Kind.COUPLED_LAYER)
        elif self.known is None:
            assert self.audit is not None
            why, owner, ways = self.audit.reason, self.audit.owner, self.audit.cures
        else:
            return
        parts = ", or say count='rows': the mean of the micro-batches' own losses, which is another gradient"
        own = "" if self._barred is not None else parts
        told = ", or ".join(way for way in ways if way != KEEP_WHOLE) or "gather the outputs in loss_fn"
        raise InexactAccumulation(
            f"the batches of {ranks} ranks cannot be added up exactly: {why}: {told}{own}", owner=owner
        )

    def refuse_unknown(self) -> None:
        """Refuses a batch in which this rank cannot count what an audit on another one has found.

        Raises:
            InexactAccumulation: It cannot.
        """
        if self.known is None and self.audit is not None:
            raise InexactAccumulation(
                f"the ranks do not count alike: {self.audit.reason}: say with count= what the loss is a mean "
                "over",
                owner=self.audit.owner,
            )

    def agree(self, ranks: Ranks) -> None:
        """Keeps the counters that every rank knows, see Note [Splitting] 5. A meeting."""
        of_all = zip(*ranks.table([pair is not None for pair in self._pairs]), strict=True)
        self._pairs = [pair for pair, known in zip(self._pairs, of_all, strict=True) if all(known)]

    def find(self, profile: Profile, memory: int, batch: Any = None) -> Plan:
        """The best exact plan. Without a batch nothing new can be proved, and what is not proved stays whole.

        Raises:
            InfeasibleBudget: No exact plan fits.
        """
        plan, refused = None, None
        if self.is_two_pass:
            return find_plan(profile, memory=memory)
        if all(graph.rows >= profile.rows for graph in profile.graphs):
            return self._find_whole(profile, memory)
        if self._barred is None:
            try:
                plan = find_plan(profile, memory=memory)
            except InfeasibleBudget as error:
                refused = error
            if plan is not None and plan.gradient_accumulation_steps == 1:
                return plan
            if self.known is None and self.audit is None and batch is not None:
                self._prove(batch)
        if self.known is not None and self._barred is None:
            if plan is None:
                assert refused is not None
                raise refused
            return plan
        return self._find_whole(self.allowed(profile), memory)

    def _find_whole(self, profile: Profile, memory: int) -> Plan:
        """The best plan that keeps the batch whole; a refusal says why it does."""
        try:
            return find_plan(profile, memory=memory)
        except InfeasibleBudget as refused:
            if profile.rows == 1 or (self._barred is None and self.audit is None):
                raise
            raise InfeasibleBudget(
                f"{refused} The batch of {profile.rows} is kept whole, because {self._hindrance()}.",
                budget_bytes=refused.budget_bytes,
                needed_bytes=refused.needed_bytes,
                owner=refused.owner,
            ) from None

    def _hindrance(self) -> str:
        """What hinders micro-batches, and what would let them be."""
        if self._barred is None:
            assert self.audit is not None
            why, ways = self.audit.reason, self.audit.cures
        else:
            why, ways = self._barred, cures(Kind.COUPLED_LAYER)
        return f"{why}: {', or '.join(way for way in ways if way != KEEP_WHOLE)}"

    def allowed(self, profile: Profile) -> Profile:
        """A profile without the micro-batches that are known not to add up; it carries the audit."""
        if self.audit is not None:
            profile = replace(profile, audit=self.audit)
        if self.is_two_pass or (self._barred is None and self.known is not None):
            return profile
        whole = tuple(graph for graph in profile.graphs if graph.rows >= profile.rows)
        return replace(profile, graphs=whole or profile.graphs)

    def settled(self, profile: Profile) -> Profile:
        """The same, except that nothing is taken away as long as nothing was asked."""
        is_open = self._barred is None and self.known is None and self.audit is None
        return profile if is_open else self.allowed(profile)

    def weights(self, parts: Sequence[Any]) -> list[Weight]:
        """The weight of each part of a batch.

        Raises:
            InexactAccumulation: No weights are known, or two ways to count that were alike so far differ.
            ValueError: There is nothing to count.
        """
        if self.known is None and self.audit is None:
            self._prove(_example(parts))
        if self.known is None or self._barred is not None:
            raise self._refusal(f"{sum(map(rows_of, parts))} rows in {len(parts)} parts")
        self._refuse_difference(parts)
        return weights(self.known, parts)

    # ---- the proof ---------------------------------------------------------------------------------

    def _prove(self, batch: Any) -> None:
        """Audits a batch whose loss is known to run; what hinders that is a reason to keep it whole."""
        try:
            found = self._audited(batch)
        except Exception as error:
            if is_out_of_memory(error):
                raise  # it says nothing about the loss
            found = undecided(f"the loss cannot be probed: {type(error).__name__}: {error}")
        self._take(found, batch)
        _log.info("%s", self.audit)

    def _audited(self, batch: Any) -> Audit:
        """The audit of a batch; layers that need not be exact do not count as mixing rows."""
        if self._job.sharding is not None:
            return undecided(
                "the model is under fully_shard, so no rank has all of it to probe (say what the loss is a "
                "mean over, count='labels' for instance; memfit.audit finds it out before fully_shard)"
            )
        with by_rows(self._job.model, self._job.batch_norm):
            largest_bytes = copy_bytes(self._job.model, self._limit_bytes)
            job = self._job._replace(batch=batch)
            return audit_terms(job, largest_copy_bytes=largest_bytes, judges_hooks=False)

    def _take(self, found: Audit, batch: Any) -> None:
        """Makes an audit's counters callable; one that this batch does not know leaves it undecided."""
        known = known_counters(self._job.model, self._job.loss_fn, batch)
        named = {name: audit.counter for name, audit in found.terms} or {"": found.counter}
        unknown = next((one for one in named.values() if one is not None and one not in known), None)
        if unknown is not None:
            found = undecided(f"'{unknown}' cannot be counted in this batch")
        self.audit, self.known, self._pairs = found, None, []
        if not found.is_exact:
            return
        counters = {name: known[one] for name, one in named.items() if one is not None}
        self.known = counters if found.terms else counters[""]
        for name, audit in found.terms or (("", found),):
            if audit.counter is not None and audit.counter != SUM:
                own = (audit.counter, counters[name])
                self._pairs += [Alike(*own, n, known[n]) if n in known else None for n in audit.alike]

    def _refuse_difference(self, parts: Sequence[Any]) -> None:
        """See Note [Splitting] 3."""
        for pair in self.alike:
            own, others = _shares(pair.counter, parts), _shares(pair.other, parts)
            if own is None or others is None or _differ(own, others):
                raise pair.refusal()

    def _refusal(self, what: str) -> InexactAccumulation:
        """Why something cannot be split, and what can be done."""
        if self._barred is not None:
            cure = "leave micro_batch_size out to keep the batch whole"
            return InexactAccumulation(
                f"{what} cannot be added up exactly: {self._barred}: {cure}", owner=self._bars
            )
        assert self.audit is not None
        told = ", or ".join(self.audit.cures)
        return InexactAccumulation(
            f"{what} cannot be added up exactly: {self.audit.reason}: {told}", owner=self.audit.owner
        )


def copy_bytes(model: nn.Module, limit_bytes: int) -> int:
    """Memory that an audit may take for a copy."""
    parameters = list(model.parameters())
    held = [*parameters, *model.buffers(), *(p.grad for p in parameters if p.grad is not None)]
    free_bytes = max(_LEAST_COPY_BYTES, limit_bytes - resident_bytes(held))
    return free_bytes if parameters[0].is_cuda else min(LARGEST_COPY_BYTES, free_bytes)


def _holds(stored: Profile, job: Job) -> bool:
    """Whether a profile has an audit that is true of this job."""
    return stored.audit is not None and what_changed(stored.basis, basis_of(job)) is None


def _example(parts: Sequence[Any]) -> Any:
    """Rows to audit: the largest part; where it has too few, a few parts joined again."""
    largest = max(parts, key=rows_of)
    if rows_of(largest) >= _LEAST_ROWS or has_lists(largest):
        return largest
    columns = zip(*([t for _, t in tensors_of(part)] for part in parts[: 2 * _LEAST_ROWS]), strict=True)
    return map_tensors(largest, lambda _: torch.cat(next(columns)))


def _shares(counter: Counter, parts: Sequence[Any]) -> list[float] | None:
    """The weights under a counter; None where it does not apply."""
    try:
        return shares(counter, parts)
    except (InexactAccumulation, ValueError, IndexError, RuntimeError):
        return None


def _differ(shares: list[float], others: list[float]) -> bool:
    """Whether two lists of weights are not the same."""
    return any(abs(a - b) > _SAME * max(a, b) for a, b in zip(shares, others, strict=True))
