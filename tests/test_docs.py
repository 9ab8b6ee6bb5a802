"""What the documents show is what the project does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import memfit

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_example_of_the_readme_is_the_one_that_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    quickstart = (ROOT / "examples" / "quickstart.py").read_text()
    assert blocks[0].strip() in quickstart.replace("  # noqa: E731", "")


def test_the_coupled_loss_of_the_readme_is_run_in_two_passes() -> None:
    block = next(b for b in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL) if "outputs_fn" in b)
    model = nn.Module()
    for tower in ("image", "text"):
        model.add_module(tower, nn.Sequential(nn.Linear(64, 2048), nn.GELU(), nn.Linear(2048, 32)))
    batch = {tower: torch.randn(1024, 64) for tower in ("image", "text")}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    names: dict[str, Any] = {"memfit": memfit, "nn": nn, "torch": torch}
    names |= {"model": model, "batch": batch, "optimizer": optimizer}
    exec(block, names)
    step = names["step"]
    assert step.plan.is_two_pass
    step(batch)
    assert step.verdict.held


def test_the_picture_of_the_readme_can_be_drawn_and_the_example_holds_its_budget() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "timeline.py")], capture_output=True, text=True, check=True
    )
    assert "budget 128.0 MiB held" in done.stdout
    assert re.search(
        r"^plain +\d+\.\d MiB\n[▁-█]{96}\nmemfit +\d+\.\d MiB\n[▁-█]{96}$", done.stdout, re.MULTILINE
    )


def test_the_table_of_the_readme_is_made_from_the_newest_results() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "render.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")),
]


@pytest.mark.parametrize("page", PAGES)
def test_links_to_files_lead_somewhere(page: str) -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text())
    for target in targets:
        if "://" not in target:
            assert ((ROOT / page).parent / target).exists(), target
