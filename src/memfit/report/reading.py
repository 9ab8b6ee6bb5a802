"""What a report is made from: a run's folder, or a plan and its profile; anything damaged is refused.

Imports no torch. ``runtime/folder.py`` says what a folder holds.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memfit.core.graph import Profile
from memfit.core.plan import Plan, dropped_values
from memfit.core.stored import decode
from memfit.errors import MemfitError

_RUN_FORMAT = "memfit-run"
_NOT_OPTIONS = ("target", "hard_cap_bytes")


class BadReport(MemfitError, ValueError):
    """A run's folder, a plan or a profile from which no report can be made."""


@dataclass(frozen=True, slots=True)
class Loss:
    """One step that was done."""

    step: int
    loss: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Source:
    """What a report tells of.

    Attributes:
        title: What was trained, or the name of the plan's file.
        command: What made it.
        plan, profile: Both or none; a plain run has none.
        losses: Of a run, in order of the steps.
        versions: Of a run, by name.
        result: Of a run that came to its end, as ``run.json`` has it.
        micro_batch_size: Pinned by an option of the run.
    """

    title: str
    command: str
    plan: Plan | None = None
    profile: Profile | None = None
    losses: tuple[Loss, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    result: Mapping[str, Any] = field(default_factory=dict)
    micro_batch_size: int | None = None


def read_source(place: Path, profile: Path | None = None) -> Source:
    """Reads a run's folder, or a plan; a plan's profile is ``profile.json`` beside it unless one is given.

    Raises:
        BadReport: Something is missing, damaged, or belongs to another plan; says what, and the cure.
        OSError: A file cannot be read.
    """
    if place.is_dir():
        return _read_run(place)
    if not place.exists():
        raise BadReport(
            f"there is no {place}. Give the --out of a `memfit train`, or a plan that `memfit plan --json` "
            "printed, with --profile"
        )
    beside = place.with_name("profile.json") if profile is None else profile
    if not beside.exists():
        raise BadReport(
            f"a report of a plan needs the profile it was made from, and there is no {beside}. Give it with "
            "--profile; `memfit train` stores it beside the plan, and in Python it is profile.to_json()"
        )
    plan, stored = _read_pair(place, beside)
    command = shlex.join(["memfit", "report", str(place), "--profile", str(beside)])
    return Source(place.name, command, plan, stored, versions=_of_basis(stored))


def _read_run(folder: Path) -> Source:
    """A run's folder."""
    path = folder / "run.json"
    if not path.exists():
        raise BadReport(f"{folder} holds no run (no run.json). Give the --out of a `memfit train`")
    run = _json(path)
    options, versions = (run.get(name) for name in ("options", "versions"))
    if run.get("format") != _RUN_FORMAT or not isinstance(options, dict) or not isinstance(versions, dict):
        raise _damaged(path, "it is not what memfit writes")
    plan = profile = None
    pair = folder / "plan.json", folder / "profile.json"
    if pair[0].exists():
        if not pair[1].exists():
            raise _damaged(pair[1], "it is missing, and the plan means nothing without it")
        plan, profile = _read_pair(*pair)
    result, pinned = run.get("result"), options.get("micro_batch_size")
    return Source(
        title=str(options.get("target", folder.name)),
        command=_command(options, run.get("processes"), folder),
        plan=plan,
        profile=profile,
        losses=_losses(folder / "losses.jsonl"),
        versions={str(name): str(version) for name, version in versions.items()},
        result=result if isinstance(result, dict) else {},
        micro_batch_size=pinned if isinstance(pinned, int) else None,
    )


def _read_pair(plan_path: Path, profile_path: Path) -> tuple[Plan, Profile]:
    """A plan and the profile it belongs to."""
    try:
        plan = Plan.from_json(plan_path.read_text("utf-8"))
    except ValueError as error:
        raise _damaged(plan_path, str(error)) from error
    try:
        profile = Profile.from_json(profile_path.read_text("utf-8"))
    except ValueError as error:
        raise _damaged(profile_path, str(error)) from error
    try:
        if plan.rows != profile.rows:
            raise ValueError(f"the plan is for {plan.rows} rows, the profile for {profile.rows}")
        dropped_values(profile.graph(plan.micro_batch_size), plan)
    except (ValueError, TypeError) as error:
        raise BadReport(
            f"{plan_path} was not made from {profile_path} ({error}). Give the profile it was made from"
        ) from error
    return plan, profile


def _losses(path: Path) -> tuple[Loss, ...]:
    """The steps done; a last line that was cut off by a kill is left out, as a resumed run does."""
    if not path.exists():
        return ()
    lines = path.read_bytes().split(b"\n")[:-1]
    try:
        found = [decode(line.decode(), "a loss") for line in lines]
        return tuple(Loss(int(e["step"]), float(e["loss"]), float(e["seconds"])) for e in found)
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error


def _json(path: Path) -> dict[str, Any]:
    """A JSON object in a file."""
    try:
        return decode(path.read_text("utf-8"), "the record of a run")
    except ValueError as error:
        raise _damaged(path, str(error)) from error


def _damaged(path: Path, why: str) -> BadReport:
    """The error for a file that is not as it was written."""
    return BadReport(f"{path} is damaged ({why}). Put the file back, or run again in another --out")


def _command(options: Mapping[str, Any], processes: object, folder: Path) -> str:
    """The command line that starts such a run."""
    words = ["memfit", "train", str(options.get("target", ""))]
    given = {name: value for name, value in options.items() if name not in _NOT_OPTIONS}
    if options.get("hard_cap_bytes") is not None:
        given["hard_cap"] = f"{options['hard_cap_bytes']}B"
    if isinstance(processes, int) and processes > 1:
        given["nproc"] = processes
    for name, value in given.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            words.append(flag)
        elif value is not None and value is not False:
            words += [flag, str(value)]
    return shlex.join([*words, "--out", str(folder)])


def _of_basis(profile: Profile) -> dict[str, str]:
    """The versions that a profile knows of."""
    return {name: value for name, value in profile.basis if name == "torch"}


def is_number(value: object) -> bool:
    """Whether a value of a file is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
