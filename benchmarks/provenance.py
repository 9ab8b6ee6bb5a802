"""Where a result came from, collected by machine; and the one way results are printed and written."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import memfit


def publish(doc: str | None, measure: Callable[[], Any]) -> Any:
    """The command line of a benchmark: measures, prints, and writes with ``--out FILE``; what it measured."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = measure()
    print(json.dumps(rows, indent=1))
    if options.out:
        options.out.write_text(json.dumps({"provenance": provenance(), "rows": rows}, indent=1))
    return rows


def provenance() -> dict[str, Any]:
    """Commit, versions, device, threads and command line of this run; no path of the machine."""
    options = [Path(word).name if word.startswith("/") else word for word in sys.argv[1:]]
    command = [Path(sys.argv[0]).name, *options]
    return {
        "date": datetime.date.today().isoformat(),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "dirty": bool(
            _git("status", "--porcelain", "--untracked-files=no", "--", ":(top,exclude)benchmarks/results")
        ),
        "memfit": memfit.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else platform.processor() or "cpu",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "command": " ".join(command),
    }


def _git(*arguments: str) -> str:
    """What git says, empty where there is none."""
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip()
