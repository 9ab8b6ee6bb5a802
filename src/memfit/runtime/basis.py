"""Reads off a job all that its profile depends on. See ``core/basis.py``."""

from __future__ import annotations

import hashlib
import re
from types import CodeType
from typing import Any

import torch
from torch import nn

from memfit.core.basis import Basis
from memfit.runtime.batch import tensors_of
from memfit.runtime.fake import is_fake
from memfit.runtime.job import Job

_SETTINGS = {
    "deterministic": torch.are_deterministic_algorithms_enabled,
    "autocast": torch.is_autocast_enabled,
    "default type": torch.get_default_dtype,
    "matmul precision": torch.get_float32_matmul_precision,
}


def basis_of(job: Job) -> Basis:
    """Versions, device, model, loss, batch, optimizer and settings, each as a short text."""
    return (
        ("torch", str(torch.__version__)),
        ("device", _device(job.model)),
        ("model", _model(job.model)),
        ("loss", _function(job.loss_fn)),
        (
            "batch",
            ", ".join(f"{n.removeprefix('batch')} {_tensor(t)}".strip() for n, t in tensors_of(job.batch)),
        ),
        ("optimizer", _optimizer(job.optimizer)),
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
    told += [
        f"{name} {type(m).__qualname__} {m.extra_repr()} {m.training}" for name, m in model.named_modules()
    ]
    count = sum(p.numel() for p in model.parameters())
    return f"{type(model).__name__} of {count:,} parameters ({_digest(told)})"


def _function(function: Any) -> str:
    """Its name and a digest of its code, with that of functions within it; of a callable object its type."""
    code = getattr(function, "__code__", None)
    name: str = getattr(function, "__qualname__", type(function).__qualname__)
    return name if code is None else f"{name} ({_digest(_told(code))})"


def _told(code: CodeType) -> list[str]:
    """What a function does, without where it stands."""
    inner = [part for const in code.co_consts if isinstance(const, CodeType) for part in _told(const)]
    constants = [
        str(sorted(map(repr, const))) if isinstance(const, frozenset) else repr(const)
        for const in code.co_consts
        if not isinstance(const, CodeType)
    ]
    return [code.co_code.hex(), *code.co_names, *constants, *inner]


def _optimizer(optimizer: torch.optim.Optimizer | None) -> str:
    """Its kind and what chooses its implementation and its state; not the rates, which change every step."""
    if optimizer is None:
        return "none"
    told = [
        f"{key}={value}"
        for group in optimizer.param_groups
        for key, value in sorted(group.items())
        if value is None or isinstance(value, (bool, str)) or key == "momentum"
    ]
    return " ".join([type(optimizer).__name__, *dict.fromkeys(told)])


def _tensor(tensor: torch.Tensor) -> str:
    """Type and shape."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _digest(texts: list[str]) -> str:
    """A short name of some texts, whatever addresses they tell."""
    text = re.sub(r" at 0x[0-9a-f]+", "", "\n".join(texts))
    return hashlib.sha256(text.encode()).hexdigest()[:12]
