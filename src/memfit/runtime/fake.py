"""Builds models from fake tensors: shapes, types and devices without memory, so that 7B fits on a laptop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.utils
from torch._subclasses.fake_tensor import FakeTensorMode


@contextmanager
def fake_tensors() -> Iterator[FakeTensorMode]:
    """Makes every tensor created in the body a fake one; ``model.to(...)`` and its kin work on them.

    ``Module.to`` exchanges fake parameters by ``torch.utils.swap_tensors``, which refuses a tensor that is
    referred to weakly, and the mode itself remembers by weak reference each tensor it has made (torch 2.13:
    "Couldn't swap Linear.weight"). That only saves it work, so it is made to forget before each exchange.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    swap: Callable[[torch.Tensor, torch.Tensor], None] = torch.utils.swap_tensors

    def forgetful_swap(first: torch.Tensor, second: torch.Tensor) -> None:
        mode.fake_tensor_converter.meta_converter.tensor_memo.clear()
        swap(first, second)

    torch.utils.swap_tensors = forgetful_swap
    try:
        with mode:
            yield mode
    finally:
        torch.utils.swap_tensors = swap
