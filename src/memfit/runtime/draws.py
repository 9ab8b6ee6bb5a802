"""Gives each row the random numbers that it had in the whole batch, and sees which ops mix rows.

Note [Draws]
 1. A run of the whole probe records what each op draws, in order. A run of some of its rows gets, for the
    same op in the same place of the order, the numbers of those rows: so dropout stays on, and a row's
    gradient is the same in any company.
 2. A draw belongs to the rows if exactly one of its dimensions grows with them (rows x tokens counts too).
    One that does not, or a permutation, is shared: the rows of a batch have it in common, and micro-batches
    would each have their own.
 3. A draw that is not a result of its own but is mixed into one (``rrelu``, dropout inside a fused kernel)
    cannot be handed out again; it is named.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from memfit.runtime.callsite import CallSites
from memfit.runtime.opinfo import draws_random_numbers, mixes_rows, op_info

Span = tuple[int, int]

_PERMUTATIONS = frozenset({"aten::randperm"})
_MIXED_IN = frozenset(
    {"aten::rrelu_with_noise", "aten::rrelu_with_noise_", "aten::rrelu_with_noise_functional"}
)
_DROPOUT = torch.ops.aten.native_dropout.default


class Draws:
    """What the whole probe drew, and what was found out about it. Lives as long as one audit's probe."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.recorded: list[tuple[str, Tensor]] = []
        self.shared: list[str] = []
        self.unknown: list[str] = []
        self.mixing: list[str] = []
        self.generators: dict[int, tuple[torch.Generator, Tensor]] = {}

    @property
    def drawn(self) -> bool:
        """Whether anything random was drawn."""
        return bool(self.recorded)

    def restore_generators(self) -> None:
        """Puts the user's own generators back."""
        for generator, state in self.generators.values():
            generator.set_state(state)


class Watch(TorchDispatchMode):
    """One run of rows ``span`` under :class:`Draws`. See Note [Draws]."""

    def __init__(self, draws: Draws, span: Span, sites: CallSites[None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._draws = draws
        self._span = span
        self._sites = sites
        self._next = 0

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs an op, with the recorded numbers if it draws any."""
        kwargs = kwargs or {}
        info = op_info(func)
        if mixes_rows(info, args):
            _add(self._draws.mixing, self._owner(func))
        if not draws_random_numbers(info, func, args, kwargs):
            return func(*args, **kwargs)
        generator = kwargs.get("generator")
        if generator is not None and id(generator) not in self._draws.generators:
            self._draws.generators[id(generator)] = (generator, generator.get_state())
        return self._draw(func, info.name, args, kwargs)

    def _draw(self, func: OpOverload, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A draw: recorded, or handed out again."""
        if func is _DROPOUT:
            return self._dropout(*args, **kwargs)
        out = func(*args, **kwargs)
        if name in _MIXED_IN or not isinstance(out, Tensor):
            _add(self._draws.unknown, self._owner(func))
            return out
        with torch.no_grad():
            out.copy_(self._numbers(func, name, out))
        return out

    def _dropout(self, x: Tensor, p: float, train: bool | None = None) -> tuple[Tensor, Tensor]:
        """Dropout in one op, whose result depends on its input: only the mask is recorded."""
        out, mask = _DROPOUT(x, p, train)
        if train is False or p in (0.0, 1.0):
            return out, mask
        mask = self._numbers(_DROPOUT, "aten::native_dropout", mask).to(mask.device)
        return x * mask / (1.0 - p), mask

    def _numbers(self, func: OpOverload, name: str, fresh: Tensor) -> Tensor:
        """The numbers that this call gives: the fresh ones in a run of the whole, else those of there."""
        recorded = self._draws.recorded
        index, self._next = self._next, self._next + 1
        if self._span == (0, self._draws.rows):
            if index >= len(recorded):
                recorded.append((name, fresh.detach().clone()))
            elif recorded[index][1].shape == fresh.shape:
                return recorded[index][1]
            return fresh
        if index >= len(recorded) or recorded[index][0] != name:
            _add(self._draws.unknown, self._owner(func))
            return fresh
        if name in _PERMUTATIONS:
            _add(self._draws.shared, self._owner(func))
            return fresh
        rows = rows_in(recorded[index][1], fresh.shape, self._span, self._draws.rows)
        if rows is None or rows.shape != fresh.shape:
            _add(self._draws.unknown, self._owner(func))
            return fresh
        if rows.shape == recorded[index][1].shape:
            _add(self._draws.shared, self._owner(func))
        return rows

    def _owner(self, func: OpOverload) -> str:
        """The module call and the op."""
        return f"{self._sites.current.name or 'loss_fn'}: {op_info(func).name}"


def rows_in(whole: Tensor, shape: torch.Size, span: Span, rows: int) -> Tensor | None:
    """The rows ``span`` of a tensor of the whole probe that has ``shape`` for them; None: there are none.

    The rows are along the one dimension that is shorter for fewer rows, several entries a row if need be.
    """
    if whole.shape == shape:
        return whole
    size = span[1] - span[0]
    if len(whole.shape) != len(shape):
        return None
    changed = [d for d in range(len(shape)) if whole.shape[d] != shape[d]]
    if len(changed) != 1 or whole.shape[changed[0]] * size != shape[changed[0]] * rows:
        return None
    each = whole.shape[changed[0]] // rows
    return whole.narrow(changed[0], span[0] * each, size * each)


def _add(names: list[str], name: str) -> None:
    """Notes a name once."""
    if name not in names:
        names.append(name)
