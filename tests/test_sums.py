"""Sums that attention and ``linear`` do in place: recorded as the step does them, with and without a mode."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from memfit.core.sums import out_of_place
from memfit.core.timeline import run
from memfit.runtime.meter import PeakMeter
from models import Net, recorded, square_loss

TOKENS, WIDTH = 64, 8
NUMBERS_BYTES = 64  # that stand for Python scalars


class Onlooker(TorchDispatchMode):
    """Does nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the op."""
        return func(*args, **(kwargs or {}))


def _masked(m: Any, x: Tensor) -> Any:
    q, k, v = (part.unsqueeze(1) for part in m.lin(x).chunk(3, -1))
    mask = torch.zeros(TOKENS, TOKENS)
    return F.scaled_dot_product_attention(q, k, v, mask, dropout_p=0.1).exp()


def _transposed(m: Any, x: Tensor) -> Any:
    return m.out(x.transpose(0, 1)).exp()


@pytest.mark.parametrize("body", [_masked, _transposed])
def test_the_peak_is_that_of_the_step_without_a_mode_and_of_the_one_with_it(body: Any) -> None:
    model = Net(body, lin=nn.Linear(WIDTH, 3 * WIDTH), out=nn.Linear(WIDTH, 16 * WIDTH))
    batch = torch.randn(4, TOKENS, WIDTH)
    recorded(model, square_loss, batch)  # torch imports more with the first call
    graph = recorded(model, square_loss, batch)
    assert any(op.is_sum_in_place for op in graph.ops)
    peaks = []
    for mode in (nullcontext(), Onlooker()):  # type: ignore[no-untyped-call]
        model.zero_grad()
        with PeakMeter("cpu") as meter:
            with mode:
                loss = square_loss(model, batch)
            loss.backward()
        peaks.append(meter.peak_bytes)
    simulated = [run(g).peak.total_bytes for g in (graph, out_of_place(graph))]
    assert [0 <= s - p <= NUMBERS_BYTES for s, p in zip(simulated, peaks, strict=True)] == [True, True]


def test_a_graph_without_such_sums_stays_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
    graph = recorded(model, square_loss, torch.randn(4, WIDTH))
    assert out_of_place(graph) is graph
