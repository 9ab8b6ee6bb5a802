"""The modules that run without the mode: each is judged by what it does to its arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from transformers.pytorch_utils import Conv1D

from memfit.runtime.quiet import _QUIET, writes_nothing

ARGUMENTS: dict[type[nn.Module], tuple[Any, ...]] = {
    nn.Linear: (4, 4),
    Conv1D: (4, 4),
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), (4, 4, 1)),
    **dict.fromkeys((nn.LayerNorm, nn.RMSNorm), (4,)),
    nn.GroupNorm: (2, 4),
    nn.Embedding: (8, 4),
    **dict.fromkeys((nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d), (2,)),
    **dict.fromkeys((nn.Softmax, nn.LogSoftmax), (-1,)),
}
SHAPES: dict[type[nn.Module], tuple[int, ...]] = {nn.Conv1d: (2, 4, 4), nn.Conv3d: (2, 4, 4, 4, 4)}


@pytest.mark.parametrize("kind", [*sorted(_QUIET, key=str), Conv1D])
def test_no_quiet_module_changes_what_it_is_given_or_has(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    module = kind(*ARGUMENTS.get(kind, ())).train()
    shape = SHAPES.get(kind, (2, 4, 4, 4))
    x = torch.randint(0, 8, (2, 4)) if kind is nn.Embedding else torch.randn(shape).requires_grad_()
    assert writes_nothing(module)
    tensors = [x, *module.parameters(), *module.buffers()]
    before, versions = [t.detach().clone() for t in tensors], [t._version for t in tensors]
    module(x).sum().backward()
    assert [t._version for t in tensors] == versions
    assert all(torch.equal(tensor, former) for tensor, former in zip(tensors, before, strict=True))


def test_what_may_write_or_is_not_torchs_own_is_watched() -> None:
    class Own(nn.Linear):
        pass

    replaced: Any = nn.Linear(4, 4)
    replaced.forward = lambda x: x.add_(1)
    watched = (nn.ReLU(inplace=True), nn.Dropout(inplace=True), nn.Embedding(8, 4, max_norm=1.0), Own(4, 4))
    for module in (*watched, replaced, weight_norm(nn.Linear(4, 4)), nn.BatchNorm1d(4), nn.LSTM(4, 4)):
        assert not writes_nothing(module), module
