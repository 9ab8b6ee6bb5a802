"""Modules of torch's own that write to nothing, by their source: no mode has to watch their ops.

Source: ``torch/nn/modules/{linear,conv,normalization,sparse,dropout,activation,pooling,flatten}.py``, and
``transformers/pytorch_utils.py`` (the linear layer of GPT-2), which is known by name, not imported.
"""

from __future__ import annotations

from typing import Final

from torch import nn

_QUIET: Final = frozenset(
    {
        *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.Embedding),
        *(nn.Dropout, nn.ReLU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Tanh, nn.Sigmoid, nn.Softmax),
        *(nn.LogSoftmax, nn.Identity, nn.Flatten, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d),
    }
)
_QUIET_BY_NAME: Final = frozenset({("transformers.pytorch_utils", "Conv1D")})
_PLAIN: Final = frozenset({nn.Parameter, nn.Buffer})


def writes_nothing(module: nn.Module) -> bool:
    """Whether a module's forward is that of torch, and no call of it can write to a tensor."""
    kind = type(module)
    return (
        (kind in _QUIET or (kind.__module__, kind.__qualname__) in _QUIET_BY_NAME)
        and "forward" not in module.__dict__
        and not getattr(module, "inplace", False)
        and getattr(module, "max_norm", None) is None
        and all(tensor is None or type(tensor) in _PLAIN for tensor in module._parameters.values())
    )
