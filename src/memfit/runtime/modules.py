"""A model's modules and their names, and which write only to their own, for who asks in every micro-batch.

``nn.Module.named_modules`` passes each module through as many generators as it is deep.
Source: ``torch/nn/modules/{linear,conv,dropout,batchnorm}.py``, and ``transformers/pytorch_utils.py`` (the
linear layer of GPT-2), which is known by name, not imported.
"""

from __future__ import annotations

from itertools import chain
from typing import Any, Final

from torch import Tensor, nn

# Modules whose kernels write to buffers and what they have made; others of torch hardly write at all.
_QUIET: Final = frozenset(
    {
        *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Dropout),
        *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
        *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    }
)
_QUIET_BY_NAME: Final = frozenset({("transformers.pytorch_utils", "Conv1D")})
_PLAIN: Final = frozenset({Tensor, nn.Parameter, nn.Buffer})


def named_modules_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """What ``model.named_modules()`` gives, in its order: a module that is there twice has its first name."""
    found: list[tuple[str, nn.Module]] = []
    seen: set[int] = set()
    waiting: list[tuple[str, nn.Module]] = [("", model)]
    while waiting:
        name, module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        found.append((name, module))
        children = module._modules
        if children:
            prefix = f"{name}." if name else ""
            waiting += [
                (prefix + key, child) for key, child in reversed(children.items()) if child is not None
            ]
    return found


def marks_of(model: nn.Module) -> list[Any]:
    """What tells whether a model is still made of the same modules, and each calls the same forward.

    The lists of two moments are equal if so. What torch.compile and ``fully_shard`` do to a module shows.
    """
    found, seen = [model], {model}
    marks: list[Any] = []
    for module in found:
        kind, table = type(module), module.__dict__
        marks += (module, kind, kind.forward, table.get("forward"), table.get("_compiled_call_impl"))
        for child in table["_modules"].values():
            if child is not None and child not in seen:
                seen.add(child)
                found.append(child)
    return marks


def writes_to_its_own(module: nn.Module) -> bool:
    """Whether a module's forward is torch's, and of what was there before can write to its buffers only."""
    kind = type(module)
    present = chain(module._parameters.values(), module._buffers.values())
    return (
        (kind in _QUIET or (kind.__module__, kind.__qualname__) in _QUIET_BY_NAME)
        and "forward" not in module.__dict__
        and not getattr(module, "inplace", False)
        and all(tensor is None or type(tensor) in _PLAIN for tensor in present)
    )
