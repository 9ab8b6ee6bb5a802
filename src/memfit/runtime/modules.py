"""A model's modules and their names, for who asks in every micro-batch.

``nn.Module.named_modules`` passes each module through as many generators as it is deep.
"""

from __future__ import annotations

from typing import Any

from torch import nn


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
