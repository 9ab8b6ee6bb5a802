"""``memfit train`` on several processes: one is killed, the run goes on, the losses are the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from memfit.cli import main

ARGUMENTS = ("ranked_job:plain", "--memory", "64MiB", "--micro-batch-size", "3", "--save-every", "4")


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "losses.jsonl").read_text().splitlines()]


def started(*arguments: object) -> subprocess.Popen[str]:
    here = Path(__file__).parent
    known = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=here,
        env=os.environ | known,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(out: Path, *more: object, steps: int = 16) -> tuple[object, ...]:
    return ("train", *ARGUMENTS, "--steps", steps, "--out", out, *more)


def kill_a_worker(of: subprocess.Popen[str], out: Path, lines: int) -> None:
    """Kills the process of the last rank once so many losses are there."""
    path = out / "losses.jsonl"
    while of.poll() is None and (not path.exists() or path.read_bytes().count(b"\n") < lines):
        time.sleep(0.02)
    children = Path(f"/proc/{of.pid}/task/{of.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)


def test_processes_share_the_batch_and_survive_a_kill(tmp_path: Path) -> None:
    assert main([str(a) for a in run(tmp_path / "one")]) == 0
    one = losses(tmp_path / "one")

    killed = started("-m", "memfit", *run(tmp_path / "two", "--nproc", 2))
    kill_a_worker(killed, tmp_path / "two", 6)
    said = killed.communicate(timeout=300)[1]
    assert killed.returncode == 6, said
    assert "was ended by SIGKILL" in said or "another process of the run has gone" in said
    assert "--resume" in said

    again = started("-m", "memfit", *run(tmp_path / "two", "--nproc", 2, "--resume"))
    said = again.communicate(timeout=300)[1]
    assert again.returncode == 0, said
    two = losses(tmp_path / "two")
    assert len(two) == 16
    assert max(abs(a - b) / abs(b) for a, b in zip(two, one, strict=True)) < 1e-9


@pytest.mark.restarts
def test_torchrun_restarts_a_run_that_lost_a_process(tmp_path: Path) -> None:
    alone = started("-m", "memfit", *run(tmp_path / "two", "--nproc", 2))
    said = alone.communicate(timeout=300)[1]
    assert alone.returncode == 0, said
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "--max-restarts", 2)
    restarted = started(*torchrun, "-m", "memfit", *run(tmp_path / "three", "--resume"))
    kill_a_worker(restarted, tmp_path / "three", 6)
    said = restarted.communicate(timeout=300)[1]
    assert restarted.returncode == 0, said
    assert losses(tmp_path / "three") == losses(tmp_path / "two")  # to the bit, as if nothing had happened
