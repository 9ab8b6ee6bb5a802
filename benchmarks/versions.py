"""Runs tests under several versions of torch and transformers, each pair in an environment of its own.

    python benchmarks/versions.py 2.10.0:5.0.0 2.15.0:5.23.0 -- tests/test_step.py tests/test_families.py

Prints a row of the table in docs/versions.md for each pair. pip takes the build it finds: on Linux that of
torch is mostly the one for CUDA, with gigabytes of libraries beside it. Environments are removed afterwards.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST_AND_NEWEST = ["2.10.0:5.0.0", "2.15.0:5.23.0"]
TESTS = [
    *("tests/test_record.py", "tests/test_fit_errors.py"),
    *("tests/runtime", "tests/test_precision.py", "tests/test_step.py", "tests/test_replay.py"),
    *("tests/test_saving.py", "tests/test_operators.py"),
    *("tests/core/test_export.py", "tests/test_families.py"),
]
OTHERS = ["numpy", "scipy", "rich", "typer", "safetensors", "accelerate", "PyYAML"]
OTHERS += ["pytest", "hypothesis", "expecttest"]


def main() -> int:
    """Runs the pairs of the command line, or the oldest and the newest."""
    pairs, _, tests = " ".join(sys.argv[1:]).partition("--")
    print("| torch | transformers | tests |\n|---|---|---|")
    outcomes = [run_pair(pair, tests.split() or TESTS) for pair in pairs.split() or OLDEST_AND_NEWEST]
    return max(outcomes)


def run_pair(pair: str, tests: list[str]) -> int:
    """Installs one pair, runs the tests and prints a row; the exit status of the tests."""
    torch, transformers = pair.split(":")
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = str(Path(folder) / "bin" / "python")
        wanted = [f"torch=={torch}", f"transformers=={transformers}", *OTHERS]
        subprocess.run([python, "-m", "pip", "install", "-q", *wanted], check=True)
        ran = subprocess.run(
            [python, "-m", "pytest", "-q", *tests],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
    lines = ran.stdout.strip().splitlines() or [ran.stderr.strip()]
    print(f"| {torch} | {transformers} | {re.sub(' in .*', '', lines[-1])} |", flush=True)
    if ran.returncode:
        print(ran.stdout, ran.stderr, file=sys.stderr)
    return ran.returncode


if __name__ == "__main__":
    sys.exit(main())
