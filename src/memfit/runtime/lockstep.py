"""A model under FSDP as an engine of ``runtime/replicas.py``: every forward and backward is one of all ranks.

Note [Lockstep]
 1. FSDP communicates in each forward and backward, so all ranks run as many micro-batches, and those that
    count nothing as well. What hinders a rank is told before the first of them; from then on an error on one
    rank leaves the others waiting, until the process group gives up, or whoever started the processes ends
    them, as torchrun does. So nothing is rescued here.
 2. The losses meet after the last backward.
 3. A micro-batch that counts nothing cannot be left out, and its mean is no number: it is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import distributed

from memfit.runtime.accumulate import is_nothing, sum_of
from memfit.runtime.batch import tensors_of
from memfit.runtime.effective import Effective
from memfit.runtime.hooks import hooks_at_the_end
from memfit.runtime.micro import Weighed, micro_batches
from memfit.runtime.ranks import Ranks
from memfit.runtime.replay import Decisions
from memfit.runtime.replicas import Engine
from memfit.runtime.sharding import Sharding, gradients_kept_whole, settled
from memfit.runtime.together import Together


class Shards(Engine):
    """A model under ``fully_shard``. See Note [Lockstep]."""

    may_wait = False
    has_equal_parts = True

    def __init__(self, sharding: Sharding) -> None:
        place = sharding.groups[0].parameters[0].device
        super().__init__(sharding.model, Ranks.of(distributed.group.WORLD, place))
        self.sharding = sharding

    @property
    def averages(self) -> int:
        """FSDP averages over its ranks."""
        return self.ranks.size

    @contextmanager
    def part(self, *, is_last: bool) -> Iterator[None]:
        """Gradients are reduced after each micro-batch, or after the last."""
        with gradients_kept_whole(self.sharding, is_last=is_last):
            yield

    def metered(self) -> AbstractContextManager[object]:
        """Gloo has let go of its buffers whenever the meter looks."""
        return settled(self.sharding)


class Lockstep(Together):
    """Runs effective batches of several ranks that communicate all the time. See Note [Lockstep]."""

    def run(self, batch: Any, micro_batch_size: int, decisions: Decisions, effective: Effective) -> Weighed:
        """The loss of the batch of all ranks and its terms; its gradient is added to ``.grad`` on each.

        Raises:
            Exception: What went wrong on the lowest rank before the first micro-batch, or on this one after.
        """
        with self._engine.ranks.together():
            todo = self._todo(batch, micro_batch_size, effective)
            if any(is_nothing(weight) for _, weight in todo):
                raise ValueError(
                    "a rank has a micro-batch in which nothing counts, and under fully_shard all ranks run "
                    "all of theirs: give every rank rows with something to count, or larger micro-batches"
                )
            self._run.tell_start()
        total: Weighed | None = None
        try:
            with (
                hooks_at_the_end(tensors_of(batch)),
                micro_batches(self._engine.model, self._run.batch_norm, several=len(todo) > 1) as begin,
            ):
                for number, (part, weight) in enumerate(todo, 1):
                    begin()
                    with self._engine.part(is_last=number == len(todo)):
                        loss = self._run.run_part(part, None if weight == 1.0 else weight, decisions)
                    total = loss if total is None else sum_of(total, loss)
        except Exception as error:
            self._engine.is_broken = True
            error.add_note(
                "This was under fully_shard, where ranks communicate in every forward and backward: the "
                "others wait until the process group gives up. End this process; torchrun ends the others."
            )
            raise
        return self._meet(total, None)
