"""The examples of where people train; their pages are run by ``tests/test_docs.py``."""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

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
