"""Training runs that are killed at random moments, and what their folders must hold after each kill.

A child is a fork of this process, which has imported everything and started no thread: so 200 of them take
minutes. A file or folder that ends in ``.tmp`` may be half written; every other one is whole or absent.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from memfit.cli import main
from memfit.core.graph import Profile
from memfit.core.plan import Plan
from memfit.runtime.state import _checkpoints, _read_state, _read_tensors, latest_checkpoint
from memfit.train import TrainOptions, _Silent, train

_POLL_S = 0.0005
_AIMED = 0.4  # of the kills: at a moment while a checkpoint is written, which is short


@dataclass
class Tally:
    """What became of some trials."""

    kills: int = 0
    while_saving: int = 0
    while_resuming: int = 0
    runs: int = 0
    wrong: list[str] = field(default_factory=list)


def warm(arguments: Sequence[str]) -> None:
    """Imports here what a command line needs, as a fork of it tells: other forks need not import it again.

    It does not run here, for a process is forked safely only while it has one thread.
    """
    reading, writing = os.pipe()
    if os.fork() == 0:
        with contextlib.suppress(BaseException), open(os.devnull, "w") as nowhere:
            with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
                main(list(arguments))
            os.write(writing, json.dumps([*sys.modules]).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        names = json.loads(pipe.read())
    os.wait()
    for name in names:
        with contextlib.suppress(Exception):  # some are no module of their own
            importlib.import_module(name)
    assert len(os.listdir("/proc/self/task")) == 1


def forked(options: TrainOptions, kill_after_s: float | None = None, *, saving: bool = False) -> int:
    """Trains in a child, which is killed after so long; its exit code, or minus the signal.

    Args:
        saving: The kill waits for the next moment after that at which a checkpoint is half written.
    """
    child = os.fork()
    if child == 0:
        code = 70
        with contextlib.suppress(BaseException):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for stream in (1, 2):
                os.dup2(nowhere, stream)
            train(options, _Silent())
            code = 0
        os._exit(code)
    end_s = time.monotonic() + (3600.0 if kill_after_s is None else kill_after_s)
    while time.monotonic() < end_s or (saving and not any(options.out.glob("step-*.tmp"))):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(_POLL_S * (not saving))
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def half_written(folder: Path) -> list[str]:
    """The files of a run that are there and cannot be read whole."""
    found = []
    readers: dict[str, Callable[[str], object]] = {
        "run.json": json.loads,
        "plan.json": Plan.from_json,
        "profile.json": Profile.from_json,
    }
    for name, reader in readers.items():
        with contextlib.suppress(FileNotFoundError):
            try:
                reader((folder / name).read_text("utf-8"))
            except ValueError as error:
                found.append(f"{name}: {error}")
    try:
        latest_checkpoint(folder)
        for checkpoint in _checkpoints(folder):
            content = _read_state(checkpoint)
            for name in ("model", "optimizer", "random"):
                _read_tensors(checkpoint, name, content)
    except ValueError as error:
        found.append(str(error))
    if (folder / "losses.jsonl").exists():
        lines = (folder / "losses.jsonl").read_bytes().split(b"\n")[:-1]
        if [json.loads(line)["step"] for line in lines] != [*range(1, len(lines) + 1)]:
            found.append("losses.jsonl: steps are missing, or there twice")
    return found


def outcome(folder: Path) -> tuple[list[str], bytes]:
    """The exact losses of a run that is done, and the bytes of its last weights."""
    lines = (folder / "losses.jsonl").read_text().splitlines()
    weights = (folder / (folder / "latest").read_text() / "model.safetensors").read_bytes()
    return [float(json.loads(line)["loss"]).hex() for line in lines], weights


def kill_again_and_again(folder: Path, options: TrainOptions, kills: int, seed: int) -> Tally:
    """Runs ``options`` undisturbed, then again and again, killed at random moments until it is done."""
    draw, tally = random.Random(seed), Tally()
    whole = folder / "whole"
    start_s = time.monotonic()
    assert forked(replace(options, out=whole)) == 0
    span_s, expected = time.monotonic() - start_s, outcome(whole)
    shutil.rmtree(whole)
    while tally.kills < kills:
        tally.runs += 1
        run = folder / f"run-{tally.runs}"
        while True:
            resume = (run / "run.json").exists()
            delay_s = draw.random() * span_s if tally.kills < kills else None
            code = forked(replace(options, out=run, resume=resume), delay_s, saving=draw.random() < _AIMED)
            tally.wrong += [f"run {tally.runs}, {tally.kills} kills: {what}" for what in half_written(run)]
            if code != -signal.SIGKILL:
                break
            tally.kills += 1
            tally.while_resuming += resume
            tally.while_saving += any(run.glob("step-*.tmp"))
        if code != 0:
            tally.wrong.append(f"run {tally.runs} ended with {code}")
        elif outcome(run) != expected:
            tally.wrong.append(f"run {tally.runs}: losses or weights differ")
        shutil.rmtree(run)
    return tally
