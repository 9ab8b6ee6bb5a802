"""Reads off a job all that its profile depends on. See ``core/basis.py``."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
import sys
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
from torch import nn

from memfit.core.basis import Basis
from memfit.runtime.batch import tensors_of
from memfit.runtime.fake import is_fake
from memfit.runtime.job import Job, each_optimizer
from memfit.runtime.micro import OutputsLoss

_SETTINGS: dict[str, Callable[[], object]] = {
    "deterministic": torch.are_deterministic_algorithms_enabled,
    "default type": torch.get_default_dtype,
    "matmul precision": torch.get_float32_matmul_precision,
    "autocast": lambda: [
        str(torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)
    ],
}
_PLAIN = (bool, int, float, str, type(None))
_DEEPEST = 4  # functions within closures within functions


def basis_of(job: Job) -> Basis:
    """Versions, device, model, loss, batch, optimizer and settings, each as a short text."""
    return (
        ("torch", str(torch.__version__)),
        ("device", _device(job.model)),
        ("model", _model(job.model)),
        ("loss", _function(job.loss_fn) + (" in two passes" if job.is_two_pass else "")),
        (
            "batch",
            ", ".join(f"{n.removeprefix('batch')} {_tensor(t)}".strip() for n, t in tensors_of(job.batch)),
        ),
        ("optimizer", " and ".join(map(_optimizer, each_optimizer(job.optimizer))) or "none"),
        ("batch norm", job.batch_norm),
        ("sharding", "none" if job.sharding is None else str(job.sharding)),
        ("settings", ", ".join(f"{name} {read()}" for name, read in _SETTINGS.items())),
    )


def _device(model: nn.Module) -> str:
    """The device by its model, not by its number."""
    parameter = next(model.parameters())
    if is_fake(parameter):
        return "none (fake tensors)"
    return torch.cuda.get_device_name(parameter.device) if parameter.is_cuda else parameter.device.type


def _model(model: nn.Module) -> str:
    """The kind, the size, and a digest of every module, parameter and buffer."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    told = [f"{name} {_tensor(t)} {t.requires_grad}" for name, t in tensors]
    told += [str(p.grad_dtype) for p in model.parameters()]
    for name, module in model.named_modules():
        told += [name, type(module).__qualname__, module.extra_repr(), *_plain_entries(module)]
    kinds = {type(module).__qualname__: type(module) for module in model.modules()}
    told += [text for kind in kinds.values() for text in _told(kind.forward)]
    told += sorted({_package(kind) for kind in kinds.values()})
    told.append(str(getattr(model, "config", "")))
    count = sum(p.numel() for p in model.parameters())
    return f"{type(model).__name__} of {count:,} parameters ({_digest(told)})"


def _package(kind: type) -> str:
    """The package that a class comes from, with its version."""
    name = kind.__module__.partition(".")[0]
    return f"{name} {getattr(sys.modules.get(name), '__version__', '')}"


def _function(function: Any) -> str:
    """Its name and a digest of what it does."""
    name: str = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{name} ({_digest(_told(function))})"


def _told(function: Any, depth: int = 0) -> list[str]:
    """What a function does, without where it stands: its code, defaults, what it closes over and calls."""
    if isinstance(function, _PLAIN):
        return [repr(function)]
    if isinstance(function, nn.Module):
        return _entries(function)
    if depth > _DEEPEST or isinstance(function, torch.Tensor):
        return [type(function).__qualname__]
    if isinstance(function, functools.partial):
        parts = [function.func, *function.args, *function.keywords.items()]
        return [text for part in parts for text in _told(part, depth + 1)]
    if isinstance(function, OutputsLoss):
        return _told((function.outputs_fn, function.of_outputs), depth)
    if isinstance(function, (tuple, list)):
        return [text for part in function for text in _told(part, depth + 1)]
    owner = getattr(function, "__self__", None)  # of a bound method
    bound = _plain_entries(owner) if hasattr(function, "__func__") else []
    function = getattr(function, "__func__", function)
    code = getattr(function, "__code__", None)
    if code is None:
        call = vars(type(function)).get("__call__")  # of a callable object
        called = _told(call, depth + 1) if hasattr(call, "__code__") else []
        return [type(function).__qualname__, *_plain_entries(function), *called]
    held = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).items(), *_globals_of(function)]
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # an empty cell
            held.append(cell.cell_contents)
    return [*_code(code), *bound, *(text for value in held for text in _told(value, depth + 1))]


def _globals_of(function: Any) -> list[Any]:
    """The functions, modules of a network and plain values that a function may use by name."""
    found = [function.__globals__.get(name) for name in function.__code__.co_names]
    return [value for value in found if isinstance(value, (*_PLAIN, nn.Module)) or hasattr(value, "__code__")]


def _entries(module: nn.Module) -> list[str]:
    """The kinds of a network and its parts, with their plain attributes."""
    return [
        text
        for name, part in module.named_modules()
        for text in (name, type(part).__qualname__, *_plain_entries(part))
    ]


def _plain_entries(owner: Any) -> list[str]:
    """The plain attributes of an object."""
    return [
        f"{key}={value!r}"
        for key, value in getattr(owner, "__dict__", {}).items()
        if isinstance(value, _PLAIN)
    ]


def _code(code: CodeType) -> list[str]:
    """The instructions and constants of a function and of those within it."""
    inner = [text for const in code.co_consts if isinstance(const, CodeType) for text in _code(const)]
    constants = [
        str(sorted(map(repr, const))) if isinstance(const, frozenset) else repr(const)
        for const in code.co_consts
        if not isinstance(const, CodeType)
    ]
    return [code.co_code.hex(), *code.co_names, *constants, *inner]


def _optimizer(optimizer: torch.optim.Optimizer) -> str:
    """Its kind, what it steps, and what chooses its implementation and its state; not rates, which change."""
    told = []
    for group in optimizer.param_groups:
        told += [
            f"{key}={group[key]}" for key in sorted(group) if isinstance(group[key], (bool, str, type(None)))
        ]
        told.append(f"momentum={bool(group.get('momentum'))}")
    stepped = [f"{_tensor(p)} {p.requires_grad}" for group in optimizer.param_groups for p in group["params"]]
    kind = type(optimizer).__name__
    return f"{kind} {' '.join(dict.fromkeys(told))}, {len(stepped)} tensors ({_digest(stepped)})"


def _tensor(tensor: torch.Tensor) -> str:
    """Type and shape."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _digest(texts: list[str]) -> str:
    """A short name of some texts, whatever addresses they tell."""
    text = re.sub(r" at 0x[0-9a-f]+", "", "\n".join(texts))
    return hashlib.sha256(text.encode()).hexdigest()[:12]
