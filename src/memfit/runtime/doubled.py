"""Runs code that was written for single or half precision in double precision, whatever it asks for.

A probe of gradients must tell a wrong weight from rounding. So in the body every floating type that is asked
for (``x.float()``, ``dtype=torch.bfloat16``, the default of ``torch.zeros``) is float64, and tensors that
come from outside the model (class weights that a loss closes over) are promoted when they meet an op. What is
written in place stays as it is. Autocast leaves float64 alone by itself (``aten/src/ATen/autocast_mode.h``).
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

LOWER = frozenset({torch.float32, torch.float16, torch.bfloat16})
_CASTS = frozenset({"float", "half", "bfloat16"})
_HANDS_OFF = frozenset({"__get__", "__set__", "__delete__", "backward", "register_hook", "data_ptr"})


class Doubled(TorchFunctionMode):
    """Context manager: floating point is float64 in the body."""

    def __enter__(self) -> Doubled:
        self._former = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        torch.set_default_dtype(self._former)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Calls ``func`` with every floating type and tensor promoted."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _HANDS_OFF:
            return func(*args, **kwargs)
        if name in _CASTS and args and isinstance(args[0], Tensor):
            return args[0].double()
        if _writes(name) or "out" in kwargs:
            return func(*args[:1], *map(doubled, args[1:]), **kwargs)
        return func(*map(doubled, args), **{key: doubled(value) for key, value in kwargs.items()})


def doubled(value: Any) -> Any:
    """An argument in double precision: a tensor, a type, or a list of them."""
    if isinstance(value, Tensor):
        return value.double() if value.dtype in LOWER else value
    if isinstance(value, torch.dtype):
        return torch.float64 if value in LOWER else value
    if type(value) in (list, tuple):
        return type(value)(doubled(item) for item in value)
    return value


def _writes(name: str) -> bool:
    """Whether a method writes to its tensor: ``add_``, ``__iadd__``, ``__setitem__``."""
    if name.startswith("__"):
        return name == "__setitem__" or (
            name[2:3] == "i" and name not in ("__index__", "__invert__", "__int__")
        )
    return name.endswith("_")
