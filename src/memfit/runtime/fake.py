"""Fake tensors: shapes, types and devices without memory, so that 7B fits on a laptop."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from memfit.runtime.batch import map_tensors
from memfit.runtime.precision import set_gradient


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


def is_fake(tensor: Tensor) -> bool:
    """Whether a tensor has no data: a fake one, or one on the meta device."""
    return isinstance(tensor, FakeTensor) or tensor.device.type == "meta"


def mode_for(model: nn.Module) -> FakeTensorMode:
    """The mode the model's tensors were made in, or a new one."""
    for tensor in model.parameters():
        if isinstance(tensor, FakeTensor):
            return tensor.fake_mode
    return FakeTensorMode(allow_non_fake_inputs=True)


class Faker:
    """Turns tensors into fake ones, the same tensor always into the same fake.

    Fakes of the meta device are on the CPU: meta tensors would take other kernels.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        self.mode = mode
        self._made: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, tensor: Tensor) -> Tensor:
        """The fake of a tensor; a parameter's is a parameter, without its gradient."""
        known = self._made.get(id(tensor))
        if known is None:
            known = self._made[id(tensor)] = (tensor, self._make(tensor))
        return known[1]

    def batch(self, batch: Any) -> Any:
        """A batch with every tensor fake."""
        return map_tensors(batch, self)

    def _make(self, tensor: Tensor) -> Tensor:
        """A new fake."""
        if tensor.device.type == "meta":
            with self.mode:
                plain = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
        elif isinstance(tensor, FakeTensor):
            plain = tensor.detach()
        else:
            with _disable_current_modes():  # an entered mode would not look at the storage
                # The mode remembers the storage as long as there is a fake of all of it.
                whole = self.mode.from_tensor(_whole(tensor)) if _is_part(tensor) else None
                plain = self.mode.from_tensor(tensor.detach())
                del whole
        if isinstance(tensor, nn.Parameter):
            parameter = nn.Parameter(plain, requires_grad=tensor.requires_grad)
            set_gradient(parameter, None, tensor.grad_dtype)
            return parameter
        return plain.requires_grad_(tensor.requires_grad) if tensor.is_leaf else plain


def _is_part(tensor: Tensor) -> bool:
    """Whether a tensor begins a larger storage, which its fake would not have."""
    is_first = tensor.layout is torch.strided and tensor.storage_offset() == 0
    return is_first and tensor.untyped_storage().nbytes() > tensor.nbytes


def _whole(tensor: Tensor) -> Tensor:
    """All of the storage that a tensor is a part of."""
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())


@contextmanager
def faked(model: nn.Module, faker: Faker) -> Iterator[None]:
    """Puts fakes in place of a model's parameters and buffers; on exit every module is as it was.

    Attributes that a forward sets (cached masks, say) are put back too: they would be fake.
    """
    with untouched(model):
        for module in model.modules():
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    if tensor is not None:
                        table[name] = faker(tensor)  # type: ignore[assignment]
        yield


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Puts every attribute, parameter, buffer, submodule and hook of a model back to what it was at entry.

    Tables get back what they held: a flag put back without the hooks it stands for would have them twice.
    """
    before = [
        (
            module,
            dict(module.__dict__),
            [(c, copy.copy(c)) for c in module.__dict__.values() if _is_container(c)],
        )
        for module in model.modules()
    ]
    try:
        yield
    finally:
        for module, attributes, containers in before:
            for name in set(module.__dict__) - set(attributes):
                del module.__dict__[name]
            module.__dict__.update(attributes)
            for container, content in containers:
                container.clear()
                container.extend(content) if isinstance(container, list) else container.update(content)


def _is_container(value: object) -> bool:
    """Whether a module's attribute is a table of its own that a forward may write to."""
    return type(value) in (dict, OrderedDict, defaultdict, list, set)
