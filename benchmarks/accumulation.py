"""How exact gradient accumulation is: losses of every class, coupled ones, and reduced precision.

    OMP_NUM_THREADS=1 python benchmarks/accumulation.py [--out FILE]

Every loss of ``tests/audits.py`` and ``tests/test_two_passes.py`` goes through ``memfit.fit`` in float64 with
unequal micro-batches of at most 3 rows; the judge is one plain backward of the whole batch. The bfloat16 row
adds up 256 micro-batches; the judge is the float64 sum of the gradients that the micro-batches have alone.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from provenance import publish
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import audits
import memfit
import test_two_passes as coupled
from memfit.errors import InexactAccumulation

MICRO_BATCHES, ROWS = 256, 4
Row = dict[str, Any]


def losses() -> Iterator[Row]:
    """One row a loss: its class, and the error of the gradient where it is accepted."""
    for case in (*audits.REPORT, *audits.MORE):
        (model, batch), (twin, _) = made(case), made(case)
        found = memfit.audit(model, case.loss, batch)
        row = {"kind": "loss", "name": case.name, "class": found.kind.value, "weighted_by": found.counter}
        row |= {"is_right": (found.kind, found.counter) == (case.kind, case.counter)}
        row |= {"has_cure": bool(found.cures), "error": None}
        try:
            step = memfit.fit(model, case.loss, batch, memory="1GiB", micro_batch_size=3)
        except InexactAccumulation:
            yield row
            continue
        if not any("random numbers" in note for note in found.notes):  # parts draw others than the whole
            step(batch)
            case.loss(twin, batch).backward()
            row["error"] = _relative(_flat(model), _flat(twin))
        yield row


def made(case: audits.Case) -> tuple[nn.Module, Any]:
    """A model in float64 and its batch, the same at every call."""
    torch.manual_seed(5)
    batch = {name: t.double() if t.is_floating_point() else t for name, t in case.batch().items()}
    return case.model().double(), batch


def two_passes() -> Iterator[Row]:
    """One row a coupled loss."""
    for name, loss_of in coupled.COUPLED.items():
        model, batch = coupled.encoder(), coupled.pairs()
        twin = copy.deepcopy(model)
        step = coupled.in_parts(model, loss_of(model), batch, 3)
        step(batch)
        coupled.total(loss_of(twin)(coupled.both(twin, batch), batch)).backward()
        yield {"kind": "two passes", "name": name, "error": coupled.worst_error(model, twin)}


def reduced_precision() -> Iterator[Row]:
    """The error of the sum of many gradients in bfloat16."""
    torch.manual_seed(0)
    layers = [nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 16)]
    model = nn.Sequential(*layers).to(torch.bfloat16)
    batch = {"x": torch.randn(MICRO_BATCHES * ROWS, 32), "y": torch.randn(MICRO_BATCHES * ROWS, 16)}
    exact, plain = _sums(model, batch)
    for name, kept in (("rounded once", None), ("float32 sums kept", torch.float32)):
        twin = copy.deepcopy(model)
        for parameter in twin.parameters() if kept else ():
            parameter.grad_dtype = kept
        step = memfit.fit(twin, _mse, batch, memory="1GiB", micro_batch_size=ROWS, count="rows")
        step(batch)
        yield {"kind": "bfloat16", "name": name, "error": _relative(_flat(twin), exact)}
    yield {"kind": "bfloat16", "name": "plain accumulation", "error": _relative(plain, exact)}


def _sums(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The gradients of all micro-batches, added up in float64 and as a plain loop does."""
    plain, exact = copy.deepcopy(model), torch.zeros(())
    for i in range(MICRO_BATCHES):
        part = {name: value[i * ROWS : (i + 1) * ROWS] for name, value in batch.items()}
        alone = copy.deepcopy(model)
        for net in (alone, plain):
            (_mse(net, part) / MICRO_BATCHES).backward()
        exact = exact + _flat(alone)
    return exact, _flat(plain)


def _mse(model: nn.Module, batch: Any) -> Tensor:
    """A mean over rows."""
    return functional.mse_loss(model(batch["x"].bfloat16()).float(), batch["y"])


def _flat(model: nn.Module) -> Tensor:
    """All gradients in one vector of float64."""
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


def _relative(found: Tensor, exact: Tensor) -> float:
    """The relative error of a vector."""
    return float((found - exact).norm() / exact.norm())


if __name__ == "__main__":
    publish(__doc__, lambda: [*losses(), *two_passes(), *reduced_precision()])
