"""Gradient checkpointing of a model's repeated blocks, with an exact undo: for people who want just that.

Note [How a block is wrapped] 1. The block's class is replaced by a subclass of it whose ``forward`` calls
``torch.utils.checkpoint``; undoing puts the class back. So ``__dict__``, state_dict keys, names, hooks, repr
and signature never change. 2. A wrapper kept on the instance would: a deep copy of it runs the original's
parameters, a pickle fails, and the model becomes a reference cycle. A copy or a pickle of a wrapped block is
a plain one. 3. Hooks of the block run outside of the checkpoint, once; those of its children run in the
recomputation again.

Note [Same start] torch.utils.checkpoint calls the block a second time, in the world as it is by then. For the
second call to be the first one again: 1. Buffers that the forward wrote (BatchNorm statistics, spectral
norm's vectors, a moving average) are swapped for private copies of what they held before, and swapped back:
the model's own are written once. 2. Writes show in a tensor's version, except those of the batch norm
kernels, which go only to floating buffers of one dimension: those always count as written. 3. Python's and
NumPy's random numbers are replayed like torch's. 4. Arguments are taken apart before the call, so that a list
the block appends to grows once, and each tensor in them is guarded by autograd's own check of overwritten
tensors. 5. A parameter that was written in between is an error. 6. A cache of keys and values is refused: it
would be filled twice.
"""

from __future__ import annotations

import difflib
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from types import TracebackType, new_class
from typing import Any, Final, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from memfit.errors import UnsupportedModel

_LISTS: Final = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


class CheckpointHandle:
    """Undoes :func:`apply_gradient_checkpointing`: by ``remove()``, or at the end of a ``with``.

    Attributes:
        blocks: The names of the wrapped blocks, in the order of the model.
    """

    __slots__ = ("_wrapped", "blocks")

    def __init__(self, wrapped: dict[str, nn.Module]) -> None:
        self.blocks = tuple(wrapped)
        self._wrapped = wrapped

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"CheckpointHandle({len(self._wrapped)} blocks checkpointed)"

    def remove(self) -> None:
        """Gives each block its own class back; a second call does nothing.

        Raises:
            RuntimeError: Somebody else has changed the class of a block since; nothing is undone.
        """
        for name, block in self._wrapped.items():
            if "_memfit_plain" not in vars(type(block)):
                raise RuntimeError(
                    f"{name!r} is a {type(block)!r} now: its class was changed after it was checkpointed, so "
                    "undo that first"
                )
        for block in self._wrapped.values():
            block.__class__ = vars(type(block))["_memfit_plain"]
        self._wrapped = {}


def apply_gradient_checkpointing(
    model: nn.Module, *, every: int = 1, blocks: Sequence[str | nn.Module] | None = None
) -> CheckpointHandle:
    """Wraps the repeated blocks of ``model`` in ``torch.utils.checkpoint`` until ``handle.remove()``.

        with memfit.apply_gradient_checkpointing(model):
            loss_fn(model, batch).backward()

    Loss, gradients, buffers (BatchNorm statistics are updated once) and random numbers are bitwise those of
    the plain step. A block is checkpointed in training mode and where gradients are enabled, else it runs
    plainly. ``memfit.fit`` needs none of this: it decides for each tensor, and takes what is checkpointed as
    it is.

    Not repeated exactly: what a block writes elsewhere than in buffers (its own Python attributes, a
    ``torch.Generator`` of its own) is written again by the recomputation, and hooks of its children run
    again. A copy or pickle of the model is a plain model. Each call copies the buffers of its block.

    Args:
        model: Any module.
        every: Wraps the first of each ``every`` blocks of a list: 2 recomputes half of them.
        blocks: Names of blocks or of lists of blocks (``["model.layers"]``), or the modules themselves. Left
            out, they are found by structure: in each outermost ``ModuleList``, ``ModuleDict`` or
            ``Sequential`` the children whose class repeats; where all of these differ in their shapes (the
            stages of a vision model), the blocks in the lists inside them.

    Raises:
        ValueError: There is no such block or none is found, ``every`` is below 1, or checkpointing is on
            already.
        TypeError: An argument is of another type.
        UnsupportedModel: A block cannot be wrapped; or, in a forward, it is given a cache of keys and values.
        RuntimeError: In a backward: a parameter of a block was written after its forward.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, not a torch.nn.Module")
    if not isinstance(every, int) or isinstance(every, bool):
        raise TypeError(f"every is {every!r}: give a whole number of blocks")
    if every < 1:
        raise ValueError(f"every is {every}: give 1 for each block, 2 for every second one...")
    _refuse_twice(model)
    groups = _found(model) if blocks is None else _named(model, blocks)
    names = {module: name for name, module in model.named_modules()}
    chosen = {names[block]: block for group in groups for block in group[::every]}
    for name, block in chosen.items():
        _refuse_block(name, block, chosen)
    subclasses = {plain: _checkpointed(plain) for plain in {type(block) for block in chosen.values()}}
    for block in chosen.values():
        block.__class__ = subclasses[type(block)]
    return CheckpointHandle(chosen)


# ---- which blocks ------------------------------------------------------------------------------------


def _found(model: nn.Module) -> list[list[nn.Module]]:
    """The blocks of each outermost list, by structure."""
    groups = [group for outermost in _outermost(model) for group in _blocks_in(outermost)]
    if not groups:
        raise ValueError(
            f"{type(model).__name__} has no list of repeated blocks (a ModuleList or Sequential with two "
            "children of one class): name them, as in blocks=['encoder.layer']"
        )
    return groups


def _outermost(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost lists of blocks in ``module``, itself included."""
    blocks = _repeated(module)
    if blocks:
        yield module
    for child in module.children():
        if child not in blocks:
            yield from _outermost(child)


def _repeated(module: nn.Module) -> list[nn.Module]:
    """The blocks of a list: children whose class repeats, and that are more than one layer of torch."""
    if not isinstance(module, _LISTS):
        return []
    blocks = [child for child in module.children() if _is_block(child)]
    kinds = Counter(type(block) for block in blocks)
    return [block for block in blocks if kinds[type(block)] > 1]


def _is_block(module: nn.Module) -> bool:
    """Whether a module has children, or is the user's own; a list without a forward is no block."""
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return False
    return next(module.children(), None) is not None or not type(module).__module__.startswith("torch.nn.")


def _blocks_in(outermost: nn.Module) -> list[list[nn.Module]]:
    """The blocks of a list; if all differ in shapes, as stages do, the blocks in the lists inside them."""
    blocks = _repeated(outermost)
    shapes = [tuple(p.shape for p in block.parameters() if not is_lazy(p)) for block in blocks]
    if len(set(shapes)) < len(shapes):
        return [blocks]
    inside = [list(_outermost(block)) for block in blocks]
    if not any(inside):
        return [blocks]
    groups: list[list[nn.Module]] = []
    for block, lists in zip(blocks, inside, strict=True):
        groups += [_repeated(inner) for inner in lists] or [[block]]
    return groups


def _named(model: nn.Module, blocks: Sequence[str | nn.Module]) -> list[list[nn.Module]]:
    """The blocks that a user asked for."""
    if isinstance(blocks, (str, nn.Module)) or not isinstance(blocks, Iterable):
        raise TypeError(f"blocks is a {type(blocks).__name__}: give a list of names or modules")
    known = dict(model.named_modules())
    groups = []
    for asked in blocks:
        module = known.get(asked) if isinstance(asked, str) else asked
        if module is None:
            close = difflib.get_close_matches(str(asked), known, n=3, cutoff=0.5)
            hint = f": did you mean {', '.join(map(repr, close))}?" if close else ""
            raise ValueError(f"the model has no module {asked!r}{hint}")
        if not isinstance(module, nn.Module):
            raise TypeError(f"blocks holds a {type(module).__name__}: give names or modules")
        if not any(module is one for one in known.values()):
            raise ValueError(f"blocks holds a {type(module).__name__} that is not part of the model")
        groups.append(_members(module))
    if not any(groups):
        raise ValueError("blocks holds no block: name some, or leave it out to find them by structure")
    return groups


def _members(module: nn.Module) -> list[nn.Module]:
    """The blocks that a named module stands for: a list for those in it, any other for itself."""
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return list(module.children())
    return _repeated(module) or [module]


def _refuse_twice(model: nn.Module) -> None:
    """Raises if checkpointing is on already, by this function or by transformers."""
    for name, module in model.named_modules():
        if isinstance(module, _Checkpointed):
            raise ValueError(
                f"{name!r} is checkpointed already: call remove() on the handle that "
                "apply_gradient_checkpointing returned before you apply it again"
            )
        if getattr(module, "gradient_checkpointing", False) is True:
            raise ValueError(
                f"gradient checkpointing of transformers is on in {name or 'the model'!r} already: call "
                "model.activation_checkpointing_disable() (or gradient_checkpointing_disable()) first"
            )


def _refuse_block(name: str, block: nn.Module, chosen: dict[str, nn.Module]) -> None:
    """Raises if a block cannot be wrapped."""
    outer = next((other for other in chosen if other != name and f"{name}.".startswith(f"{other}.")), None)
    if outer is not None or (name != "" and "" in chosen):
        raise ValueError(
            f"{name!r} is inside {outer or 'the model'!r}, which is in blocks too: give one of them"
        )
    reason = None
    if isinstance(block, (nn.ModuleList, nn.ModuleDict)):
        reason = "is a list of modules, which has no forward: name the modules in it"
    elif isinstance(block, torch.jit.ScriptModule):
        reason = "is a ScriptModule, whose forward is not Python"
    elif isinstance(block, LazyModuleMixin):
        reason = "has no parameters yet: run the model once before"
    elif "forward" in vars(block):
        reason = "has a forward of its own on the instance (a patch, or torch.compile): undo that first"
    if reason is not None:
        raise UnsupportedModel(f"{name!r} ({type(block).__name__}) {reason}", owner=name)


# ---- the wrapped block -------------------------------------------------------------------------------


class _Checkpointed:
    """Marks the class of a wrapped block."""

    _memfit_plain: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A copy or a pickle is an object of the plain class, which can be found by its name."""
        reduced = super().__reduce_ex__(protocol)
        if not isinstance(reduced, tuple) or reduced[1][:1] != (type(self),):
            return reduced  # the user's own way to copy
        # Not copyreg.__newobj__, with which pickle demands the class of the object itself.
        return (self._memfit_plain.__new__, (self._memfit_plain,), *reduced[2:])


def _checkpointed(plain: type[nn.Module]) -> type[nn.Module]:
    """A subclass that looks like ``plain``, and recomputes its forward in the backward."""
    plain_forward = plain.forward

    @wraps(plain_forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not self.training or not torch.is_grad_enabled():
            return plain_forward(self, *args, **kwargs)
        call = _Call(self, plain_forward, args, kwargs)
        return checkpoint(call, *call.leaves, use_reentrant=False, preserve_rng_state=True)

    subclass: type[nn.Module] = new_class(plain.__name__, (_Checkpointed, plain))
    look = {name: getattr(plain, name) for name in ("__module__", "__qualname__", "__doc__")}
    # Set after the class is made: transformers' layers wrap the forward of each new subclass.
    for name, value in {**look, "forward": forward, "_memfit_plain": plain}.items():
        setattr(subclass, name, value)
    return subclass


class _Call:
    """One call of a block: first the forward, then its recomputation. See Note [Same start]."""

    __slots__ = ("_block", "_buffers", "_forward", "_given", "_host", "_spec", "_versions")

    def __init__(
        self, block: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        _refuse_cache(block, args, kwargs)
        leaves, self._spec = tree_flatten((args, kwargs))
        self._given: tuple[tuple[Any, ...], dict[str, Any], list[Any]] | None = (args, kwargs, leaves)
        self._block = block
        self._forward = forward

    @property
    def leaves(self) -> list[Any]:
        """The arguments without their nesting."""
        assert self._given is not None
        return self._given[2]

    def __call__(self, *leaves: Any) -> Any:
        """Runs the forward on what was given, and later on what torch.utils.checkpoint has kept of it."""
        if self._given is None:
            args, kwargs = tree_unflatten(leaves, self._spec)
            with self._same_start():
                return self._forward(self._block, *args, **kwargs)
        args, kwargs, _ = self._given
        self._given = None  # what is needed again is kept by torch.utils.checkpoint, and checked by it
        self._host = (random.getstate(), np.random.get_state())
        self._versions: list[tuple[nn.Parameter, int]] = []
        self._buffers = [_Buffer.of(*found) for found in _buffers_of(self._block)]
        output = self._forward(self._block, *args, **kwargs)
        self._buffers = [buffer for buffer in self._buffers if buffer.was_written()]
        self._versions = [(p, p._version) for p in self._block.parameters() if not p.is_inference()]
        return output

    @contextmanager
    def _same_start(self) -> Iterator[None]:
        """Buffers and random numbers as the forward found them; afterwards as they were at entry."""
        self._refuse_written_parameters()
        host = (random.getstate(), np.random.get_state())
        copies: dict[int, Tensor] = {}
        present = [buffer.swap_in(copies) for buffer in self._buffers]
        _set_host(*self._host)
        try:
            yield
        finally:
            _set_host(*host)
            for buffer, tensor in zip(self._buffers, present, strict=True):
                buffer.owner._buffers[buffer.name] = tensor

    def _refuse_written_parameters(self) -> None:
        """Raises if the recomputation would use other parameters than the forward did."""
        for parameter, version in self._versions:
            if parameter._version != version:
                name = next((n for n, p in self._block.named_parameters() if p is parameter), "a parameter")
                raise RuntimeError(
                    f"{name!r} of a checkpointed {type(self._block).__name__} was written after its forward, "
                    "so its gradients would be wrong: call backward() before optimizer.step()"
                )


@dataclass(frozen=True, slots=True, eq=False)
class _Buffer:
    """A buffer before a forward: the tensor and a copy of what it held."""

    owner: nn.Module
    name: str
    tensor: Tensor | None
    version: int
    content: Tensor | None

    @staticmethod
    def of(owner: nn.Module, name: str, tensor: Tensor | None) -> _Buffer:
        """The buffer as it is now."""
        if tensor is None:
            return _Buffer(owner, name, None, 0, None)
        return _Buffer(owner, name, tensor, _version(tensor), tensor.detach().clone())

    def was_written(self) -> bool:
        """Whether the forward may have written it, or put another tensor in its place."""
        if self.tensor is None or self.owner._buffers.get(self.name) is not self.tensor:
            return self.owner._buffers.get(self.name) is not self.tensor
        unseen = self.tensor.is_floating_point() and self.tensor.dim() == 1
        return unseen or _version(self.tensor) != self.version

    def swap_in(self, copies: dict[int, Tensor]) -> Tensor | None:
        """Puts a private copy in its place, one for all modules that share it; returns what was there."""
        present = self.owner._buffers.get(self.name)
        if self.content is not None and id(self.tensor) not in copies:
            copies[id(self.tensor)] = self.content.clone()  # it may be needed again, under retain_graph
        self.owner._buffers[self.name] = copies.get(id(self.tensor)) if self.content is not None else None
        return present


def _buffers_of(block: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor | None]]:
    """Each buffer of a block with the module that holds it."""
    for owner in block.modules():
        for name, tensor in owner._buffers.items():
            yield owner, name, tensor


def _version(tensor: Tensor) -> int:
    """How often a tensor was written, as far as autograd sees it."""
    return 0 if tensor.is_inference() else tensor._version


def _set_host(python: Any, numpy: Any) -> None:
    """Sets the states of the random generators of Python and NumPy."""
    random.setstate(python)
    np.random.set_state(numpy)


def _refuse_cache(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises if a block is given a cache, which its forward and its recomputation would both fill."""
    for value in (*args, *kwargs.values()):
        if hasattr(value, "get_seq_length") and hasattr(value, "update"):
            raise UnsupportedModel(
                f"a checkpointed {type(block).__name__} was given a {type(value).__name__}: the "
                "recomputation would fill it a second time, and it keeps what checkpointing frees. Training "
                "needs no cache: call the model with use_cache=False",
                owner=type(block).__name__,
            )
