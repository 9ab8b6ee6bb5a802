"""What is measured at few rows, and what at all of them, one op at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import memfit
from memfit.core.graph import Residents
from memfit.core.timeline import run
from memfit.runtime.job import Job, first_rows
from memfit.runtime.measure import measurable_rows, measure, temporaries_at
from memfit.runtime.meter import PeakMeter
from memfit.runtime.record import Recording
from strategies import Piece, build

ROWS = 32
CPU = torch.device("cpu")


def convolutions() -> nn.Module:
    """Kernels whose workspaces do not grow in proportion to the rows."""
    torch.manual_seed(0)
    layers = (nn.Conv1d(4, 32, 10, stride=5), nn.GELU(), nn.Conv1d(32, 32, 3, stride=2), nn.GELU())
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(3))


def squares(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = model(batch).square().mean()
    return loss


def sounds(rows: int = ROWS) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(rows, 4, 800)


@pytest.fixture
def model() -> nn.Module:
    built = convolutions()
    built(sounds(1))
    return built


@pytest.mark.parametrize("rows", [ROWS, 12, 5])
def test_the_peak_is_exact_though_few_rows_were_measured(model: nn.Module, rows: int) -> None:
    batch = sounds()
    profile = memfit.profile(model, squares, batch)
    (graph,) = (g for g in profile.graphs if g.rows == rows) if rows == ROWS else (profile.graph(rows),)
    part = first_rows(batch, ROWS, graph.rows)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if graph.gradients_resident else None
    with PeakMeter("cpu") as meter:
        squares(model, part).backward()
    predicted_bytes = run(graph).peak.total_bytes
    assert meter.peak_bytes <= predicted_bytes + 64
    if rows == ROWS:
        assert predicted_bytes <= meter.peak_bytes + 64


def test_only_ops_with_temporaries_run_at_all_rows_and_only_where_they_fit(model: nn.Module) -> None:
    job = Job(model, squares, sounds(), None)
    points = measure(job, CPU, 4)
    assert points is not None
    known = points[1]
    most = temporaries_at(job, CPU, known, ROWS, None)
    assert most is not None
    names = {key.op.split(" ")[0] for key in most.temporary_bytes}
    assert "aten.convolution_backward.default" in names
    assert "aten.gelu.default" not in names
    assert max(most.temporary_bytes.values()) > max(known.temporary_bytes.values())
    nothing = temporaries_at(job, CPU, known, ROWS, 1000)
    assert nothing is not None
    assert nothing.temporary_bytes == {}
    assert temporaries_at(job, CPU, known, known.rows, None) is None


def test_measuring_a_pinned_micro_batch_keeps_to_the_limit() -> None:
    """A step of 100 rows takes 1000 bytes and more, residents 500: 700 bytes are enough for a few rows."""
    graph = build((Piece(sizes=(10,), saves_outputs=(0,)),), rows=100)
    peak_bytes = run(graph).peak.total_bytes
    residents = Residents(300, 200, 0, 0)
    rows = measurable_rows([Recording(graph, (), ())], residents, 100, 700)
    assert rows == 100 * 200 // peak_bytes < 100
    assert measurable_rows([Recording(graph, (), ())], residents, 100, 100) == 1
    assert measurable_rows([Recording(graph, (), ())], residents, 100, 10**9) == 100


def test_a_fit_with_a_pinned_micro_batch_stays_within_its_memory_while_it_measures() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    batch = torch.randn(4096, 64)
    seen: list[int] = []

    def loss(m: Any, b: Tensor) -> Tensor:
        if type(b) is Tensor:
            seen.append(len(b))
        return squares(m, b)

    memfit.fit(model, loss, batch, memory=6_500_000, micro_batch_size=4096, count="rows")
    assert 0 < max(seen) < 4096
