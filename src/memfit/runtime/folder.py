"""The files of a run besides its checkpoints: what it was asked for, its plan, its losses.

    run.json      the options the run was started with, the versions, and the result once there is one
    plan.json     the plan in use (not in a plain run)
    profile.json  what it was made from, as the first steps have corrected it
    losses.jsonl  one line for each step: {"step", "loss", "seconds"}; the loss is exact

Files that are replaced are replaced whole; the losses grow by whole lines and are cut back on a resume.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memfit.core.graph import Profile
from memfit.core.plan import Plan
from memfit.core.stored import decode
from memfit.runtime.state import BadCheckpoint, replace_text

FORMAT = "memfit-run"
# A change of these would change the losses, so a resumed run must repeat them.
_FIXED = ("target", "batch_size", "seed", "plain", "device")


def start_run(folder: Path, content: Mapping[str, Any]) -> None:
    """Makes the folder of a new run and writes its ``run.json``.

    Raises:
        ValueError: The folder holds a run or anything else already.
        OSError: The folder cannot be made.
    """
    _refuse_file(folder)
    if (folder / "run.json").exists():
        raise ValueError(
            f"--out {folder} already holds a run. Add --resume to go on with it, or give another."
        )
    strangers = [path.name for path in folder.glob("*") if path.suffix != ".tmp"] if folder.exists() else []
    if strangers:
        raise ValueError(
            f"--out {folder} is not empty ({strangers[0]}...) and holds no run. Give a new folder."
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_run(folder, content)


def check_resumable(folder: Path, options: Mapping[str, Any]) -> None:
    """Refuses to resume what is not a run, or a run that was started with options that change its losses.

    Raises:
        ValueError: Names the file or the option, and the cure.
    """
    _refuse_file(folder)
    path = folder / "run.json"
    try:
        content = decode(path.read_text("utf-8"), "the record of a run")
    except FileNotFoundError:
        raise ValueError(f"--out {folder} holds no run to resume. Leave out --resume to start.") from None
    except ValueError as error:
        raise BadCheckpoint(f"{path} is damaged ({error}). Start anew in another --out.") from error
    if content.get("format") != FORMAT:
        raise BadCheckpoint(f"{path} was not written by memfit. Give the --out of a memfit run.")
    started = content.get("options")
    if not isinstance(started, dict):
        raise BadCheckpoint(f"{path} is damaged (no options). Start anew in another --out.")
    for name in _FIXED:
        if started.get(name) != options[name]:
            raise ValueError(
                f"The run in {folder} was started with {name} = {started.get(name)!r}, not "
                f"{options[name]!r}: another value would change its losses. Repeat it, or start anew in "
                f"another --out."
            )


def write_run(folder: Path, content: Mapping[str, Any]) -> None:
    """Writes ``run.json``."""
    replace_text(
        folder / "run.json", json.dumps({"format": FORMAT, "version": 1, **content}, indent=1) + "\n"
    )


def write_plan(folder: Path, plan: Plan, profile: Profile) -> None:
    """Writes ``plan.json`` and ``profile.json``."""
    replace_text(folder / "plan.json", plan.to_json())
    replace_text(folder / "profile.json", profile.to_json())


def read_plan(folder: Path) -> Plan | None:
    """Returns the stored plan, ``None`` if the run was stopped before it had one."""
    path = folder / "plan.json"
    if not path.exists():
        return None
    try:
        return Plan.from_json(path.read_text("utf-8"))
    except (ValueError, KeyError, TypeError) as error:
        raise BadCheckpoint(f"{path} is damaged ({error}). Start anew in another --out.") from error


def read_profile(folder: Path) -> Profile | None:
    """Returns the stored profile; ``None`` if there is none that can be read, for it can be made again."""
    try:
        return Profile.from_json((folder / "profile.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None


def _refuse_file(folder: Path) -> None:
    """Refuses a file in the place of a folder."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder} is a file. Give a folder.")


class LossLog:
    """Appends to ``losses.jsonl``, one unbuffered line for each step."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "losses.jsonl"
        self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115

    def __enter__(self) -> LossLog:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def add(self, step: int, loss: float, seconds: float) -> None:
        """Appends a line. JSON keeps every bit of a float in Python."""
        line = (json.dumps({"step": step, "loss": loss, "seconds": round(seconds, 6)}) + "\n").encode()
        try:
            while line:  # where room ends within a line, the system writes a part and says nothing
                line = line[self._file.write(line) :]
        except OSError as error:
            raise OSError(
                error.errno,
                f"{self._path} could not be written: {error.strerror}. The last checkpoint is untouched. "
                f"Make room, and go on with --resume",
            ) from error

    def sync(self) -> None:
        """Flushes to the disk: a checkpoint must not be newer than its losses."""
        os.fsync(self._file.fileno())


def cut_losses(folder: Path, steps: int) -> tuple[float, ...]:
    """Cuts ``losses.jsonl`` back to the first ``steps`` steps and returns them.

    Raises:
        BadCheckpoint: Losses of steps that the checkpoint has done are missing.
    """
    path = folder / "losses.jsonl"
    lines = path.read_bytes().split(b"\n")[:steps] if path.exists() else []
    try:
        entries = [decode(line.decode(), "a loss") for line in lines]
        in_order = [entry["step"] for entry in entries] == [*range(1, len(lines) + 1)]
        losses = tuple(float(entry["loss"]) for entry in entries)
    except (ValueError, KeyError, TypeError, OverflowError):
        in_order, losses = False, ()
    if not in_order or len(losses) != steps:
        raise BadCheckpoint(
            f"{path} does not hold the {steps} steps of the checkpoint. Put the file back, or start anew in "
            f"another --out."
        )
    replace_text(path, "".join(line.decode() + "\n" for line in lines))
    return losses
