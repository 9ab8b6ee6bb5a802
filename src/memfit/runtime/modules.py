"""A model's modules and their names, for who asks in every micro-batch.

``nn.Module.named_modules`` passes each module through as many generators as it is deep.
"""

from __future__ import annotations

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
