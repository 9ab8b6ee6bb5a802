"""Rivals as they come from the registry: do they import, and do they plan a small model on this machine?

    python benchmarks/peers_registry.py [--out FILE]

Each is installed into an environment of its own, without its pins of torch: it sees the torch of this one.
Then it plans a chain of six blocks. Needs the registry. What fails is recorded in its own words.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import venv
from pathlib import Path
from typing import Any

import torch
from provenance import publish

_CKPTPLAN = """
import torch
from torch import nn
import ckptplan
model = nn.Sequential(*(nn.Sequential(nn.Linear(256, 256), nn.GELU()) for _ in range(6)))
x = torch.randn(64, 256)
blocks = ckptplan.declare_blocks(model, [(str(i), block) for i, block in enumerate(model)])
profiles = ckptplan.profile_blocks(blocks, (x,), device="cpu")
plan = ckptplan.plan_checkpoints(
    profiles,
    blocks,
    target_kind="activation_saving_fraction",
    target_value=0.5,
    planner="dynamic_programming",
)
ckptplan.apply_plan(blocks, plan, (x,))
"""
_ROCKMATE = """
import torch
from torch import nn
import rockmate
model = nn.Sequential(*(nn.Sequential(nn.Linear(256, 256), nn.GELU()) for _ in range(6)))
rockmate.PureRockmate(model, (torch.randn(64, 256),), 2**22)
"""
# What they need beside torch, as their own metadata says.
EXAMPLES = {"ckptplan": ((), _CKPTPLAN), "rockmate": (("rkgb", "pulp", "configmypy"), _ROCKMATE)}


def measure() -> list[dict[str, Any]]:
    """One row a rival."""
    return [_tried(name, needs, code) for name, (needs, code) in EXAMPLES.items()]


def _tried(name: str, needs: tuple[str, ...], code: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / "bin" / "python"
        (site,) = Path(folder).glob("lib/python*/site-packages")
        (site / "shared.pth").write_text(str(Path(torch.__file__).parents[1]))
        flags = ["--disable-pip-version-check", "--no-deps", "--ignore-installed", "--pre"]
        installed = _run(str(python), "-m", "pip", "install", *flags, name, *needs)
        if installed.returncode:
            return {"name": name, "version": None, "works": False, "said": _last_line(installed.stderr)}
        asked = f"from importlib.metadata import version; print(version({name!r}))"
        version = _run(str(python), "-c", asked).stdout.strip()
        ran = _run(str(python), "-c", code)
        said = _last_line(ran.stderr) if ran.returncode else ""
        return {"name": name, "version": version, "works": ran.returncode == 0, "said": said}


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)


def _last_line(text: str) -> str:
    """The error itself, without paths of this machine."""
    lines = text.strip().splitlines() or [""]
    return re.sub(r"(/[\w.+-]+){2,}", "...", lines[-1])[:300]


if __name__ == "__main__":
    publish(__doc__, measure)
