"""The quick walk over a model's modules against torch's own, and which modules need not be watched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from memfit.runtime.modules import _QUIET, named_modules_of, writes_to_its_own

ARGUMENTS: dict[type[nn.Module], tuple[Any, ...]] = {
    nn.Linear: (4, 4),
    Conv1D: (4, 4),
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), (4, 4, 1)),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), (4, 4, 1)),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), (4,)),
}


class Shared(nn.Module):
    """A module that is there twice, one inside of another, and one that is None."""

    def __init__(self) -> None:
        super().__init__()
        inner = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        self.register_module("nothing", None)
        self.first = nn.Sequential(inner, nn.Tanh())
        self.second = inner
        self.third = inner[0]


def test_modules_come_as_torch_names_them_in_its_order() -> None:
    config = GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=16, bos_token_id=0, eos_token_id=0)
    for model in (Shared(), GPT2LMHeadModel(config), nn.Linear(1, 1)):
        assert named_modules_of(model) == list(model.named_modules())


@pytest.mark.parametrize("kind", [*sorted(_QUIET, key=str), Conv1D])
def test_a_module_that_is_not_watched_changes_nothing_but_its_buffers(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    module = kind(*ARGUMENTS.get(kind, ())).train()
    dims = int(kind.__name__[-2]) if kind.__name__[-1] == "d" else 2
    x = torch.randn((2, 4, *[4] * dims)).requires_grad_()
    assert writes_to_its_own(module)
    tensors = [x, *module.parameters()]
    before, versions = [t.detach().clone() for t in tensors], [t._version for t in tensors]
    module(x).sum().backward()
    assert [t._version for t in tensors] == versions
    assert all(torch.equal(tensor, former) for tensor, former in zip(tensors, before, strict=True))


def test_what_may_write_elsewhere_or_is_not_torchs_own_is_watched() -> None:
    class Own(nn.Linear):
        pass

    replaced: Any = nn.Linear(4, 4)
    replaced.forward = lambda x: x.add_(1)
    watched = (nn.ReLU(inplace=True), nn.Dropout(inplace=True), nn.Embedding(8, 4, max_norm=1.0), Own(4, 4))
    for module in (*watched, replaced, weight_norm(nn.Linear(4, 4)), nn.LSTM(4, 4), nn.SyncBatchNorm(4)):
        assert not writes_to_its_own(module), module
