"""Hooks of saved tensors that can be set aside for a while, and never go above those of somebody else.

Note [Set aside]
 1. Autograd calls the pair of hooks on top of a stack. What is pushed under ours does not matter to us, and
    what is pushed over ours, such as those of a checkpoint in the model, keeps all saves from us.
 2. So ours are taken away only while they are on top, and put back only onto what lay under them.
Source: ``torch/csrc/autograd/python_saved_variable_hooks.cpp``.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch._C._autograd import _top_saved_tensors_default_hooks as _top
from torch.autograd.graph import saved_tensors_hooks


class SaveHooks:
    """Context manager that has hooks in force, but for the times in which they are set aside."""

    def __init__(self, hooks: saved_tensors_hooks) -> None:
        self._hooks = hooks
        self._below: Any = None
        self._is_on = False

    def __enter__(self) -> SaveHooks:
        self._below = _pack_on_top()
        self._hooks.__enter__()
        self._is_on = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_on:
            self._hooks.__exit__(kind, error, trace)
            self._is_on = False

    def set(self, *, is_on: bool) -> None:
        """Puts them aside, or back, where nobody else's are on top."""
        if is_on is self._is_on or _pack_on_top() is not (self._below if is_on else self._hooks.pack_hook):
            return
        if not is_on:
            self._hooks.__exit__(None, None, None)
        elif torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]
            self._hooks.__enter__()
        else:
            return
        self._is_on = is_on


def _pack_on_top() -> Any:
    """The pack hook in force, None if there is none."""
    hooks = _top(True)
    return None if hooks is None else hooks[0]
