"""How the gradients of several processes come together: the seam between memfit and PyTorch's own engines.

Note [Engines]
 1. An engine knows the module that everything works on which runs without the others: profile, audit, call
    sites, snapshots. Names are those of a single process, and nothing communicates there.
 2. Micro-batches run on that module too, in ``part()``. Only the last backward starts from ``joined(loss)``,
    and it brings the gradients of all ranks together. Before it, all ranks meet once.
 3. What cannot come together in the last backward (``Engine.may_wait``) does so in a backward of its own,
    that hands every sum over (``runtime/hooks.py``).

Note [DDP]
 1. DDP's ``forward`` is three things: before (buffers of rank 0 to all, buckets as gradients came), the
    module, after (the hooks on the parameters now expect one backward). ``begin`` is the first, ``joined``
    the last; between them the module runs as often as there are micro-batches, by itself. Comm
    hooks, gradients that are views of buckets and unused parameters are DDP's affair, as ever.
 2. DDP averages over the ranks. So a weight is that of the whole batch of all ranks, times their number.
 3. Hooks of parameters run before DDP reduces, on what the rank gives to the average, as in a plain step.
 4. Gradients in reduced precision are added up in float32, rounded, and then reduced in the parameters' type.
 5. DDP counts the hooks of a static graph in every backward, also where none is expected, and does not reduce
    in a later step then (its own ``no_sync`` fails with it too): a static graph is refused.
 6. Buckets are as large as the gradients and stay. A view of a bucket is the gradient itself, but only from
    the reduction on: until then there are both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn

from memfit.errors import UnsupportedModel
from memfit.runtime.ranks import Ranks
from memfit.runtime.sharding import Sharding


class Engine:
    """One process alone: gradients are together as soon as they are there. See Note [Engines].

    Attributes:
        ranks: The processes.
        model: The module that runs without the others.
        is_broken: The last backward failed on this rank, so that the others wait for it: there is nothing
            that could be run again together.
        may_wait: Gradients may come together in a backward of their own, after the last micro-batch.
        has_equal_parts: Every rank must run as many micro-batches as the others.
        held_sizes: Bytes of each block that it holds throughout, beside the parameters.
        owns_gradients: ``.grad`` lies in those blocks once gradients are together.
        sharding: How FSDP holds the model, see ``runtime/sharding.py``.
    """

    may_wait = True
    has_equal_parts = False
    held_sizes: tuple[int, ...] = ()
    owns_gradients = False
    sharding: Sharding | None = None

    def __init__(self, model: nn.Module, ranks: Ranks | None = None) -> None:
        self.model = model
        self.ranks = ranks or Ranks()
        self.is_broken = False

    @property
    def averages(self) -> int:
        """By how much the gradients of all ranks are divided when they come together."""
        return 1

    def check(self) -> None:
        """Refuses a step that cannot be one of all ranks."""

    def begin(self) -> None:
        """Called on all ranks before the first micro-batch, also if the step is run again."""

    @contextmanager
    def part(self, *, is_last: bool) -> Iterator[None]:
        """Around forward and backward of each micro-batch."""
        yield

    def joined(self, root: Tensor) -> Tensor:
        """What the last backward starts from, on all ranks, so that it brings gradients together."""
        return root

    def metered(self) -> AbstractContextManager[object]:
        """Around a step that is measured."""
        return nullcontext()


class Replicas(Engine):
    """A model in ``torch.nn.parallel.DistributedDataParallel``. See Note [DDP]."""

    def __init__(self, ddp: Any) -> None:
        module = ddp.module
        super().__init__(module, Ranks.of(ddp.process_group, next(module.parameters()).device))
        self._ddp = ddp
        self._refuse()
        ignored = ddp.parameters_to_ignore
        own = [p for name, p in module.named_parameters() if p.requires_grad and name not in ignored]
        self.held_sizes = tuple(p.numel() * p.element_size() for p in own)
        self.owns_gradients = bool(ddp.gradient_as_bucket_view)

    def _refuse(self) -> None:
        """Refuses what DDP does inside of a forward, or in other meetings than memfit's."""
        for name, module in self.model.named_modules():
            if isinstance(module, nn.SyncBatchNorm):
                raise UnsupportedModel(
                    f"'{name}' is a SyncBatchNorm, which communicates in every forward, so that micro-"
                    "batches are normalised by other statistics than the whole batch: use torch.nn.BatchNorm "
                    "with batch_norm='frozen' or 'ghost', or a GroupNorm",
                    owner=name,
                )
        if self._ddp.static_graph:
            raise UnsupportedModel(
                "DistributedDataParallel(static_graph=True) counts every backward through the model, that "
                "of a micro-batch or a profile too, and leaves out reductions then (its no_sync() fails as "
                "well): leave static_graph out",
                owner="model",
            )
        if self._ddp.mixed_precision is not None:
            raise UnsupportedModel(
                "DistributedDataParallel(mixed_precision=...) casts parameters inside of its own forward: "
                "use torch.autocast in loss_fn",
                owner="model",
            )
        if self._ddp._delay_all_reduce_params:
            raise UnsupportedModel(
                "DistributedDataParallel(delay_all_reduce_named_params=...) reduces outside of its buckets: "
                "leave it out",
                owner="model",
            )

    @property
    def averages(self) -> int:
        """DDP averages over its ranks."""
        return self.ranks.size

    def check(self) -> None:
        """Refuses DDP's ``join()``, whose ranks that have ended meet nobody any more."""
        if self._ddp._join_config.enable:
            raise UnsupportedModel(
                "the step runs inside of DDP's join(), whose ranks end at different steps: give every rank "
                "as many batches (DistributedSampler does), of any number of rows each",
                owner="model",
            )

    def begin(self) -> None:
        """What DDP does before a forward."""
        self._ddp._pre_forward()

    @contextmanager
    def part(self, *, is_last: bool) -> Iterator[None]:
        """Nothing communicates, also where ``loss_fn`` calls the wrapped model on its own."""
        with self._ddp.no_sync():
            yield

    def joined(self, root: Tensor) -> Tensor:
        """What DDP does after a forward."""
        self._ddp.require_backward_grad_sync = True  # as outside of no_sync(), which puts it back
        found: Tensor = self._ddp._post_forward(root)
        return found
