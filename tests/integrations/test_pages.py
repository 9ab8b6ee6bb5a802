"""The examples and pages on where people train: what they show runs."""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import memfit

ROOT = Path(__file__).parents[2]
PAGES = ("lightning", "accelerate", "plain_loop")

pytestmark = [  # both are Lightning's own
    pytest.mark.filterwarnings(r"ignore:.*`isinstance\(treespec, LeafSpec\)` is deprecated"),
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings(
        "ignore:The number of training batches .* is smaller than the logging interval"
    ),
]


@pytest.fixture(autouse=True)
def _no_state_is_left() -> Iterator[None]:
    """Accelerate keeps what the first Accelerator was made with."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def example(name: str) -> dict[str, Any]:
    """The names that an example defines."""
    return runpy.run_path(str(ROOT / "examples" / f"{name}.py"))


def blocks(page: str) -> list[str]:
    """The code that a page shows."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / f"{page}.md").read_text(), flags=re.DOTALL)


def parts() -> dict[str, Any]:
    """What the pages take for granted."""
    torch.manual_seed(0)
    layers = [m for _ in range(6) for m in (nn.Linear(128, 128), nn.GELU())]
    model = nn.Sequential(*layers, nn.Linear(128, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=8)
    batches = [(torch.randn(256, 128), torch.randint(10, (256,))) for _ in range(3)]
    average = torch.optim.swa_utils.AveragedModel(model)
    found: dict[str, Any] = {"torch": torch, "nn": nn, "memfit": memfit, "model": model}
    found |= {"optimizer": optimizer, "schedule": schedule, "batches": batches, "batch": batches[0]}
    return found | {"average": average}


@pytest.mark.parametrize("name", ["lightning_loop", "accelerate_loop", "plain_loop"])
def test_examples_are_short(name: str) -> None:
    assert len((ROOT / "examples" / f"{name}.py").read_text().splitlines()) <= 60


@pytest.mark.parametrize("page", PAGES)
def test_pages_are_short_and_their_links_lead_somewhere(page: str) -> None:
    path = ROOT / "docs" / f"{page}.md"
    assert len(path.read_text().splitlines()) <= 70
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        assert (path.parent / target).exists(), target


def test_the_plain_loop_resumes_bit_for_bit(tmp_path: Path) -> None:
    train = example("plain_loop")["train"]
    first, _ = train(tmp_path / "state.pt", 10)
    size = torch.load(tmp_path / "state.pt")["rows"]  # else measured seconds choose it each time
    second, resumed = train(tmp_path / "state.pt", 20)
    straight, model = train(tmp_path / "straight.pt", 20, size)
    assert first + second == straight
    for one, other in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_loop_with_accelerate_trains_and_saves(tmp_path: Path) -> None:
    losses, _ = example("accelerate_loop")["train"](tmp_path / "state")
    assert len(losses) == 8
    assert any((tmp_path / "state").iterdir())


def test_the_lightning_module_trains_within_its_memory() -> None:
    trainer, step = example("lightning_loop")["train"]()
    assert trainer.global_step == 8
    assert step.verdict.held


def test_the_page_on_lightning_runs() -> None:
    from lightning import pytorch as pl

    shown = example("lightning_loop")
    data = torch.utils.data.TensorDataset(torch.randn(512, 128), torch.randint(10, (512,)))
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    names = {**parts(), "pl": pl, "module": shown["Classifier"](), "options": options}
    names["loader"] = torch.utils.data.DataLoader(data, batch_size=256)
    for block in blocks("lightning"):
        exec(block, names)
    assert names["memfit_callback"].step.verdict.held


def test_the_page_on_accelerate_runs() -> None:
    from accelerate import Accelerator

    data = torch.utils.data.TensorDataset(torch.randn(512, 128), torch.randint(10, (512,)))
    names = {**parts(), "Accelerator": Accelerator, "loss_fn": example("accelerate_loop")["loss_fn"]}
    names["loader"] = torch.utils.data.DataLoader(data, batch_size=256)
    for block in blocks("accelerate"):
        exec(block, names)
    assert names["step"].verdict.held


def test_the_page_on_plain_loops_runs(tmp_path: Path) -> None:
    names = {**parts(), "path": tmp_path / "state.pt"}
    for block in blocks("plain_loop"):
        exec(block, names)
    assert len(names["notes"]) == names["step"].plan.gradient_accumulation_steps
