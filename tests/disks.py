"""Trainings on disks that are full or cannot be written, as the command line runs them."""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import subprocess
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from kills import half_written, outcome
from memfit.cli import main

_CAPABILITY_VERSION_3 = 0x20080522
_OVERRIDES = 0b1110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER
_SAYS = (
    "disk is full",
    "No space left on device",
    "File too large",
    "Read-only file system",
    "Permission denied",
)


@dataclass
class Disks:
    """What became of some trials."""

    trials: int = 0
    stopped: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def command(arguments: list[str], before: Callable[[], None] = lambda: None) -> tuple[int, str]:
    """Runs a command line in a fork; its exit code and what it said on stderr."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 70
        os.dup2(writing, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            before()
            code = main(arguments)
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        os._exit(code)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().decode("utf-8", "replace")
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


def train_in(run: Path, *more: str) -> list[str]:
    """The command line of a small training."""
    options = {
        "--memory": "1GiB",
        "--out": str(run),
        "--steps": "6",
        "--save-every": "1",
        "--micro-batch-size": "3",
    }
    return ["train", "jobs:tiny", *(word for pair in options.items() for word in pair), "--quiet", *more]


@contextmanager
def small_disk(folder: Path, size_bytes: int = 4 << 20) -> Iterator[Path | None]:
    """A disk in memory, mounted beneath a folder; None where that is not permitted."""
    place = folder / f"memfit-disk-{os.getpid()}"
    place.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={size_bytes}", "none", str(place)]
    mount = shutil.which("mount")
    done = mount and not subprocess.run([mount, *options], capture_output=True, check=False).returncode
    try:
        yield place if done else None
    finally:
        if done:
            subprocess.run(["umount", str(place)], check=True)
        place.rmdir()


def fill(disk: Path, left_bytes: int) -> Path:
    """Fills a disk but for some bytes; returns the file that does."""
    ballast = disk / "ballast"
    free_bytes = shutil.disk_usage(disk).free
    ballast.write_bytes(bytes(max(0, free_bytes - left_bytes)))
    return ballast


def full(disk: Path, trials: int, seed: int) -> Disks:
    """Trainings that run into the end of a disk, each gone on with once there is room."""
    draw, tally = random.Random(seed), Disks()
    whole = disk / "whole"
    code, said = command(train_in(whole))
    assert code == 0, said
    needed_bytes = sum(-(-path.stat().st_size // 4096) * 4096 for path in _files(whole))
    expected = outcome(whole)
    shutil.rmtree(whole)
    for trial in range(trials):
        run = disk / f"run-{trial}"
        ballast = fill(disk, draw.randrange(needed_bytes + 65536))
        tally.trials += 1
        code, said = command(train_in(run))
        tally.wrong += _judged(f"trial {trial}", run, code, said, tally.stopped)
        ballast.unlink()
        resume = ["--resume"] if (run / "run.json").exists() else []
        code, said = command(train_in(run, *resume))
        if code != 0 or outcome(run) != expected:
            tally.wrong.append(
                f"trial {trial}: with room again it ends with {code}, or otherwise: {said[-300:]}"
            )
        shutil.rmtree(run)
    return tally


def _files(run: Path) -> list[Path]:
    """What a training needs room for; its page is much larger."""
    return [path for path in run.rglob("*") if path.suffix != ".html"]


def _judged(name: str, run: Path, code: int, said: str, stopped: Counter[str]) -> list[str]:
    """What is wrong with how a training ended that may have met a full disk."""
    wrong = [f"{name}: {what}" for what in half_written(run)]
    if code == 0:
        stopped["not: only its page could not be written" if "report was not" in said else "not"] += 1
        return wrong
    reason = next((reason for reason in _SAYS if reason in said), None)
    stopped["before the first checkpoint" if not (run / "latest").exists() else "after a checkpoint"] += 1
    if code != 5 or reason is None or "Traceback" in said:
        wrong.append(f"{name}: ends with {code}: {said[-300:]}")
    return wrong


def limited(folder: Path, trials: int, seed: int) -> Disks:
    """The same by a limit on the size of files, which needs no rights."""
    import resource
    import signal

    draw, tally = random.Random(seed), Disks()
    whole = folder / "whole"
    code, said = command(train_in(whole))
    assert code == 0, said
    most_bytes = max(path.stat().st_size for path in _files(whole))
    expected = outcome(whole)
    for trial in range(trials):
        run, limit_bytes = folder / f"limited-{trial}", draw.randrange(most_bytes)

        def limit(limit_bytes: int = limit_bytes) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

        tally.trials += 1
        code, said = command(train_in(run), limit)
        tally.wrong += _judged(f"limit {limit_bytes}", run, code, said, tally.stopped)
        resume = ["--resume"] if (run / "run.json").exists() else []
        code, said = command(train_in(run, *resume))
        if code != 0 or outcome(run) != expected:
            tally.wrong.append(f"limit {limit_bytes}: without it, it ends with {code}: {said[-300:]}")
    return tally


def read_only(folder: Path, trials: int, seed: int) -> Disks:
    """Trainings that are to go on in a folder that they may not write: an error, and nothing is changed."""
    draw, tally = random.Random(seed), Disks()
    for trial in range(trials):
        run = folder / f"closed-{trial}"
        steps = draw.randrange(1, 6)
        assert command(train_in(run, "--steps", str(steps)))[0] == 0
        before = contents_of(run)
        where = draw.choice((run, run / before_checkpoint(run))) if draw.random() < 0.8 else folder
        more = ("--resume",) if where != folder else ()
        target = run if where != folder else folder / f"new-{trial}"
        tally.trials += 1
        tally.stopped["within a run" if where != folder else "a new run"] += 1
        with closed(folder):
            code, said = command(train_in(target, *more), _without_rights)
        if code != 5 or not any(reason in said for reason in _SAYS) or "Traceback" in said:
            tally.wrong.append(f"trial {trial}: ends with {code}: {said[-300:]}")
        if contents_of(run) != before:
            tally.wrong.append(f"trial {trial}: files are changed")
    return tally


def before_checkpoint(run: Path) -> str:
    """The name of the latest checkpoint."""
    return (run / "latest").read_text()


def contents_of(folder: Path) -> dict[str, bytes]:
    """Every file beneath a folder."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def closed(folder: Path) -> Iterator[None]:
    """Nobody but root may write beneath a folder."""
    places = [folder, *(path for path in folder.rglob("*"))]
    modes = [path.stat().st_mode for path in places]
    for path in places:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        yield
    finally:
        for path, mode in zip(places, modes, strict=True):
            path.chmod(mode & 0o7777)


def _without_rights() -> None:
    """Root may write everywhere; this process no more: it gives up the capabilities that say so."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable, in two halves
    library = ctypes.CDLL(None, use_errno=True)
    if library.capget(header, sets) == 0:
        sets[0] &= ~_OVERRIDES
        if library.capset(header, sets):
            raise OSError(ctypes.get_errno(), "capset")
