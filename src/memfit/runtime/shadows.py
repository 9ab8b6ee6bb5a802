"""A sharded model recorded without its other ranks: whole fake parameters, and blocks that stand for FSDP's.

Note [Shadows]
 1. The modules get fake parameters of full size, of the type that the forward sees, and lose FSDP's hooks.
    Those of this file take their place and allocate, at the same moments, blocks of no content
    (*shadows*) as large as FSDP's buffers; so the recorder sees when each comes and goes. Whole parameters
    are no storages of the step themselves: their shadow is.
 2. Unsharding takes a buffer for the gathered group, then the parameters. In the forward that buffer lives
    until the next group has been unsharded, in the backward until its own copy-out, and there the group
    that comes next is gathered already when a group's backward begins.
 3. Reducing takes a buffer as large as the group's gradients, which lives until the next group reduces, and
    the pieces, which are the gradients or are added to them.
 4. Gloo takes a copy of what it gathers or reduces; NCCL takes none.
 5. The parameters of a group whose inputs have no gradient are reduced when the backward is over; the root's
    too, whose first gradients wait for that.
 6. Where gradients are added up whole and reduced once, one recording stands for all micro-batches after the
    first: at each moment for the higher of the last one, which frees whole gradients, and the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import Function, Variable
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from memfit.runtime.fake import Faker
from memfit.runtime.sharding import Group, Sharding, local


class ShardedFaker(Faker):
    """Fakes of a sharded model: whole parameters for the forward, and :meth:`piece` for the optimizer."""

    def __init__(self, mode: FakeTensorMode, sharding: Sharding) -> None:
        super().__init__(mode)
        self._types = {id(p): group.dtype for group in sharding.groups for p in group.parameters}
        self._pieces = Faker(mode)
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._ranks = sharding.groups[0].ranks

    def _make(self, tensor: Tensor) -> Tensor:
        """A whole fake of a sharded tensor."""
        if local(tensor) is tensor:
            return super()._make(tensor)
        dtype = self._types.get(id(tensor)) or tensor.dtype
        with self.mode:
            whole = torch.empty(tensor.shape, dtype=dtype, device=tensor.device)
        return nn.Parameter(whole, requires_grad=tensor.requires_grad)

    def piece(self, tensor: Tensor) -> Tensor:
        """The fake of what lies on the rank that has most of it, so that the plan fits all."""
        part = local(tensor)
        if part is tensor:
            return self._pieces(tensor)
        known = self._kept.get(id(tensor))
        if known is None:
            rows, *others = tensor.shape
            with self.mode:
                fake = torch.empty(-(-rows // self._ranks), *others, dtype=tensor.dtype, device=tensor.device)
            if isinstance(tensor, nn.Parameter):
                fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
            known = self._kept[id(tensor)] = (tensor, fake)
        return known[1]


class _Pass:
    """What the groups share in one forward and backward."""

    def __init__(self) -> None:
        self.shadows: list[_Shadow] = []
        self.order: list[_Shadow] = []
        self.gathered: Tensor | None = None
        self.reduced: Tensor | None = None
        self.pieces: list[Tensor] = []
        self.freed_bytes = 0
        self._is_queued = False

    def queue_the_end(self) -> None:
        """Lets :meth:`_end` follow the backward that is running."""
        if not self._is_queued:
            self._is_queued = True
            Variable._execution_engine.queue_callback(self._end)

    def _end(self) -> None:
        """The backward is over."""
        for shadow in self.shadows:
            if not shadow.is_reduced:
                shadow.after_backward()
        self.reduced = None


class _Shadow:
    """What FSDP does for one group, in blocks of no content. See Note [Shadows]."""

    def __init__(self, group: Group, common: _Pass, *, is_first: bool, once: bool) -> None:
        self.is_reduced = False
        self._group = group
        self._common = common
        self._is_first = is_first
        self._once = once
        self._whole: list[Tensor] | None = None
        self._gathered: Tensor | None = None
        self._uses: list[int] = []
        self._in_backward = False

    def _block(self, size_bytes: int) -> Tensor:
        """Memory as large as that."""
        return torch.empty(max(0, size_bytes), dtype=torch.uint8, device=self._group.parameters[0].device)

    @property
    def _copied(self) -> int:
        """1 where the backend copies what it sends."""
        return int(self._group.is_copied and self._group.ranks > 1)

    def _gather(self) -> None:
        """FSDP's ``unshard``."""
        if self._whole is not None or self._gathered is not None:
            return
        if self._group.ranks == 1:
            self._gathered = self._block(0)
            return
        cast = self._block(self._group.cast_bytes) if self._group.cast_bytes else None
        self._gathered = self._block(self._group.gathered_bytes)
        if self._copied:
            self._block(self._group.gathered_bytes)
        del cast

    def _copy_out(self, *, is_forward: bool) -> None:
        """FSDP's ``wait_for_unshard``."""
        if self._gathered is None:
            return
        cast = self._block(self._group.cast_bytes) if self._group.ranks == 1 else None
        self._whole = [self._block(size) for size in self._group.gathered_sizes]
        del cast
        if is_forward and self._group.ranks > 1:
            self._common.gathered = self._gathered
        self._gathered = None

    # ---- the hooks -------------------------------------------------------------------------------

    def before_forward(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Gathers the parameters; the last gradient of the inputs will be seen."""
        leaves, structure = tree_flatten(_cast((args, kwargs), self._group.cast_inputs_to))
        self._gather()
        self._copy_out(is_forward=True)
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if places and torch.is_grad_enabled():
            seen = _Seen.apply(self.after_backward, *(leaves[i] for i in places))  # type: ignore[no-untyped-call]
            for i, tensor in zip(places, seen, strict=True):
                leaves[i] = tensor
        found: tuple[Any, Any] = tree_unflatten(leaves, structure)
        return found

    def after_forward(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Frees the parameters, if they are; the first gradient of the outputs will be seen."""
        if self._group.is_freed:
            self._whole = None
        self._uses.append(len(self._common.order))
        self._common.order.append(self)
        if torch.is_grad_enabled():
            for tensor in tree_leaves(output):
                if isinstance(tensor, Tensor) and tensor.requires_grad:
                    tensor.register_hook(self.before_backward)
        if not self._group.name:
            self._common.gathered = None
        return _cast(output, self._group.cast_outputs_to)

    def before_backward(self, gradient: Tensor) -> Tensor:
        """Gathers the parameters again, and those of the group before."""
        self._common.queue_the_end()
        if not self._in_backward:
            self._in_backward, self.is_reduced = True, False
            self._gather()
            self._copy_out(is_forward=False)
            if self._uses and (use := self._uses.pop()) > 0:
                self._common.order[use - 1]._gather()
        return gradient

    def after_backward(self) -> None:
        """Frees the parameters and reduces their gradients."""
        self._in_backward, self.is_reduced = False, True
        self._whole = self._common.reduced = None
        places = [module._parameters[name] for module, name in self._group.places]
        trained = [p for p in places if p is not None and p.requires_grad]
        sizes = [s for p, s in zip(trained, self._group.reduced_sizes, strict=True) if p.grad is not None]
        if sizes:
            (self._reduce_at_last if self._once else self._reduce)(sum(sizes), trained)

    def _reduce(self, size_bytes: int, parameters: list[nn.Parameter]) -> None:
        """Whole gradients become pieces."""
        self._common.reduced = self._block(size_bytes)
        for p in parameters:
            p.grad = None
        pieces = self._block(size_bytes // self._group.ranks)
        if self._copied:
            self._block(size_bytes)
        if self._group.is_rounded:
            pieces = self._block(self._group.piece_bytes)
        if self._is_first:
            self._common.pieces.append(pieces)

    def _reduce_at_last(self, size_bytes: int, parameters: list[nn.Parameter]) -> None:
        """The same where whole gradients count as residents. See Note [Shadows] 6."""
        common = self._common
        self._block(size_bytes - common.freed_bytes)
        whole_bytes = sum(p.grad.nbytes for p in parameters if p.grad is not None)
        common.freed_bytes += whole_bytes - size_bytes // self._group.ranks
        self._block(size_bytes * (1 + self._copied) - common.freed_bytes)
        common.reduced = self._block(size_bytes - common.freed_bytes)


class _Seen(Function):
    """Tells when the gradients of all tensors that went through have been taken."""

    @staticmethod
    def forward(ctx: Any, tell: Callable[[], None], *tensors: Tensor) -> tuple[Tensor, ...]:
        """The tensors as they are."""
        ctx.tell = tell
        return tensors

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """The gradients as they are."""
        ctx.tell()
        return None, *gradients


def _cast(tree: Any, dtype: torch.dtype | None) -> Any:
    """All floating tensors of a nesting in one type."""
    if dtype is None:
        return tree
    return tree_map(
        lambda leaf: leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf, tree
    )


@contextmanager
def shadowed(sharding: Sharding | None, *, resident: bool) -> Iterator[None]:
    """One micro-batch in the body does in memory what it would under FSDP; the model is a fake twin.

    Args:
        resident: It is not the first one.
    """
    if sharding is None:
        yield
        return
    common = _Pass()
    once = resident and sharding.reduces_once
    if not once:
        for p in sharding.model.parameters():
            p.grad = None
    handles = []
    for group in sharding.groups:
        shadow = _Shadow(group, common, is_first=not resident, once=once)
        common.shadows.append(shadow)
        for handle in group.hooks:
            handle.remove()  # the tables are put back as they were when the model gets its own parameters
        handles.append(
            group.module.register_forward_pre_hook(shadow.before_forward, prepend=True, with_kwargs=True)
        )
        handles.append(group.module.register_forward_hook(shadow.after_forward))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
