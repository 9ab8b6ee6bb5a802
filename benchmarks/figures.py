"""The newest results, for whatever shows figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def newest(kind: str, where: str = "") -> tuple[Any, str]:
    """The rows of the newest result file of a kind, and a link to it; ``where`` leads to the root."""
    files = sorted((ROOT / "benchmarks" / "results").glob(f"*_cpu_{kind}.json"))
    if not files:
        raise SystemExit(f"no result of benchmarks/{kind}.py yet: make help lists what measures")
    data = json.loads(files[-1].read_text())
    return data["rows"], f"[{kind}]({where}benchmarks/results/{files[-1].name})"
