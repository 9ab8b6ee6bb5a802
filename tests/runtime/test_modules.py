"""The quick walk over a model's modules against torch's own."""

from __future__ import annotations

from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from memfit.runtime.modules import named_modules_of


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
