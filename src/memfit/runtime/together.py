"""One step on several ranks: micro-batches on each of them, and one synchronisation.

Note [Meetings]
 1. Ranks meet twice in a step: when it opens (what each counts), and before the backward that synchronises
    (that all went well so far, and the losses). Both are all-reduces of a few numbers (``runtime/ranks.py``).
 2. So an error before the second meeting, running out of memory too, is one of all ranks, and they can run
    the step again together. In the backward that synchronises it is not: the others wait in it until the
    process group gives up, or whoever started the processes ends them all, as torchrun does.
 3. The last micro-batch synchronises in its own backward, so that communication hides behind it. It does not
    where hooks are to see whole gradients, where sums in float32 are to be rounded first, where a rank has
    nothing to count, or after memory has run out: then all that a rank has is handed over in a backward of
    its own, and nothing large runs after the second meeting. Which of both is each rank's own affair.
 4. Ranks may run different numbers of micro-batches, unless the engine needs them equal.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from memfit.core.batching import balanced_parts, parts_for
from memfit.runtime.accumulate import Accumulation, is_nothing, sum_of
from memfit.runtime.batch import refuse_graphs, rows_of, split, tensors_of
from memfit.runtime.effective import Effective
from memfit.runtime.hooks import Sums, handed_over, sums_of_parts
from memfit.runtime.micro import Weighed, Weight, alone, backward, micro_batches, refuse_no_gradients
from memfit.runtime.precision import SUM, empty_gradient, has_narrow
from memfit.runtime.replay import Decisions
from memfit.runtime.replicas import Engine

_Todo = list[tuple[Any, Weight]]


class Together:
    """Runs effective batches of several ranks. See Note [Meetings]."""

    def __init__(self, run: Accumulation, engine: Engine) -> None:
        self._run = run
        self._engine = engine
        self._names: tuple[str, ...] = ()
        self.is_cautious = False

    def run(self, batch: Any, micro_batch_size: int, decisions: Decisions, effective: Effective) -> Weighed:
        """The loss of the batch of all ranks and its terms; its gradient is added to ``.grad`` on each.

        Raises:
            Exception: What went wrong on the lowest rank where something did.
        """
        with ExitStack() as stack:
            failure: Exception | None = None
            total, last, sums, is_apart = None, None, Sums(), True
            try:
                todo = self._todo(batch, micro_batch_size, effective)
                self._run.tell_start()
                is_apart = self._is_apart(batch, todo)
                if is_apart:
                    total, sums = self._sums(batch, todo, decisions)
                else:
                    total, last = self._all_but_a_backward(todo, decisions, stack)
            except Exception as error:
                failure = error
            try:
                loss = self._meet(total, failure)
            finally:
                del failure  # it holds this frame, and this frame would hold it
            self._synchronise(last, sums)
        return loss

    def _todo(self, batch: Any, micro_batch_size: int, effective: Effective) -> _Todo:
        """The micro-batches of this rank that count, with their weights; all, where all must be equally many.

        Raises:
            ValueError: This rank has too few rows for that.
        """
        refuse_no_gradients()
        rows, count = rows_of(batch), effective.parts(micro_batch_size)
        if count > 1:
            refuse_graphs(batch)
        if not self._engine.has_equal_parts:
            sizes = parts_for(rows, min(rows, micro_batch_size))
        elif rows < count:
            raise ValueError(
                f"a rank has {rows} rows and another runs {count} micro-batches, and all ranks must run as "
                "many: give the ranks more equal batches"
            )
        else:
            sizes = balanced_parts(rows, count)
        parts = split(batch, sizes)
        todo = [*zip(parts, effective.weights(parts), strict=True)]
        if not self._engine.may_wait:
            return todo
        return [(part, weight) for part, weight in todo if not is_nothing(weight)]

    def _is_apart(self, batch: Any, todo: _Todo) -> bool:
        """Whether gradients come together in a backward of their own. See Note [Meetings] 3."""
        if not self._engine.may_wait:
            return False
        if not todo or self.is_cautious:
            return True
        leaves = [*self._engine.model.parameters(), *(t for _, t in tensors_of(batch))]
        return len(todo) > 1 and (has_narrow(self._engine.model) or any(t._backward_hooks for t in leaves))

    def _sums(self, batch: Any, todo: _Todo, decisions: Decisions) -> tuple[Weighed | None, Sums]:
        """Runs all micro-batches; zeros are the sums of none."""
        model = self._engine.model
        total: Weighed | None = None
        with (
            sums_of_parts([*model.named_parameters(), *tensors_of(batch)], of_all=True) as sums,
            micro_batches(model, self._run.batch_norm, several=len(todo) > 1) as begin,
        ):
            for part, weight in todo:
                begin()
                with self._engine.part(is_last=False):
                    loss = self._run.run_part(part, weight, decisions)
                total = loss if total is None else sum_of(total, loss)
        if not todo:
            there = {id(leaf) for leaf, _ in sums}
            wanted = (p for p in model.parameters() if p.requires_grad and id(p) not in there)
            sums += [(p, empty_gradient(p).zero_()) for p in wanted]
        return total, sums

    def _all_but_a_backward(
        self, todo: _Todo, decisions: Decisions, stack: ExitStack
    ) -> tuple[Weighed, Tensor]:
        """Runs all micro-batches but the last one's backward; what holds for that too is on ``stack``."""
        model = self._engine.model
        begin = stack.enter_context(micro_batches(model, self._run.batch_norm, several=len(todo) > 1))
        total: Weighed | None = None
        for part, weight in todo[:-1]:
            begin()
            with self._engine.part(is_last=False):
                loss = self._run.run_part(part, weight, decisions)
            total = loss if total is None else sum_of(total, loss)
        begin()
        stack.enter_context(self._engine.part(is_last=True))
        part, weight = todo[-1]
        last = self._run.forward(part, None if weight == 1.0 else weight, decisions)
        loss = last._replace(total=alone(last.total))
        return loss if total is None else sum_of(total, loss), last.total

    def _synchronise(self, last: Tensor | None, sums: Sums) -> None:
        """The backward that brings the gradients of all ranks together."""
        try:
            if last is not None:
                backward(self._engine.joined(last), self._run.scaler)
                return
            with self._engine.part(is_last=True):
                root = handed_over(sums)
                assert root is not None
                backward(self._engine.joined(root))
        except Exception as error:
            self._engine.is_broken = True
            error.add_note(
                "This was in the backward in which the ranks' gradients come together: the others wait in it "
                "until the process group gives up. End this process; torchrun ends the others then."
            )
            raise

    # ---- the loss -----------------------------------------------------------------------------------

    def _meet(self, own: Weighed | None, failure: Exception | None) -> Weighed:
        """The meeting before the backward that synchronises: the loss of all ranks."""
        ranks, averages = self._engine.ranks, self._engine.averages
        terms = {} if own is None else own.terms
        row: list[float | Tensor] = [0.0 if own is None else own.total, float(len({*terms} - {*self._names}))]
        table = ranks.table([*row, *(terms.get(name, 0.0) for name in self._names)], failure)
        new = [int(count) for _, count, *_ in table]
        if any(new):
            teller = next(rank for rank, count in enumerate(new) if count)
            self._names += tuple(
                ranks.share("\n".join(sorted({*terms} - {*self._names})), teller).split("\n")
            )
            return self._meet(own, failure)
        means = [sum(column) / averages for column in zip(*table, strict=True)]
        total, _, *each = (self._number(mean, own) for mean in means)
        return Weighed(total, dict(zip(self._names, each, strict=True)))

    def _number(self, value: float, like: Weighed | None) -> Tensor:
        """A number of the type of a loss."""
        first = next(self._engine.model.parameters())
        dtype = torch.promote_types(first.dtype, SUM) if like is None else like.total.dtype
        return torch.tensor(value, dtype=dtype, device=first.device)
