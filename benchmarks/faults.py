"""Kills, full disks, lost memory, hostile files, long trainings, errors, odd command lines: docs/faults.md.

    OMP_NUM_THREADS=1 python benchmarks/faults.py [--only PART ...] [--also FILE ...] [--share 1] [--out FILE]

Each part is a process of its own; what it found is written as soon as it ends. The cases are those of
``tests/kills.py``, ``disks.py``, ``outages.py``, ``hostile.py``, ``steady.py`` and ``commands.py``, of which
the suite runs a few. Fails where a promise was broken; ``wrong`` in a row says which.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any

from provenance import provenance

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

Row = dict[str, Any]
_FLAT_BYTES = 1 << 16  # that a training may hold more after 10,000 steps than after 1,000
_FLAT_RESIDENT_BYTES = 4 << 20  # the same, of the memory of the process
_SLOW_S = 20.0  # for a file of some 100 KB, whatever it holds
_LARGE_BYTES = 1 << 29  # that reading all of them may take


@contextmanager
def _folder() -> Iterator[Path]:
    """A folder for a part."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def kills(share: float) -> Iterator[Row]:
    """``kill -9`` at random moments, also while saving and while resuming."""
    import disks
    from kills import kill_again_and_again, warm
    from memfit.train import TrainOptions

    with _folder() as folder:
        warm(disks.train_in(folder / "warm"))
        options = TrainOptions("jobs:tiny", "1GiB", 24, folder, save_every=2)
        tally = kill_again_and_again(folder, options, _part(200, share), seed=1)
    counts = {"while saving": tally.while_saving, "of resumed runs": tally.while_resuming, "runs": tally.runs}
    yield _row("kill -9", tally.kills, counts, tally.wrong)


def full_disks(share: float) -> Iterator[Row]:
    """Disks without room, files that may not grow, folders that are closed."""
    import disks
    from kills import warm

    with _folder() as folder:
        warm(disks.train_in(folder / "warm"))
        with disks.small_disk(folder) as disk:
            if disk is not None:
                found = disks.full(disk, _part(30, share), seed=1)
                yield _row("full disk", found.trials, found.stopped, found.wrong)
        found = disks.limited(folder, _part(15, share), seed=1)
        yield _row("no file may grow further", found.trials, found.stopped, found.wrong)
        closed = folder / "closed"
        closed.mkdir()
        found = disks.read_only(closed, _part(15, share), seed=1)
        yield _row("read-only folder", found.trials, found.stopped, found.wrong)


def outages(share: float) -> Iterator[Row]:
    """Out of memory, raised at random ops and in replays."""
    from rescue import injected

    rows = [injected(name, _part(70, share)) for name in ("whole", "in parts")]
    where = sum((Counter(row["where"]) for row in rows), Counter[str]())
    wrong = [what for row in rows for what in row["differences"]]
    yield _row("out of memory, raised at a random op", where.total(), where, wrong)


def moved_caps(share: float) -> Iterator[Row]:
    """Out of memory for real, where the hard cap of the process is moved."""
    from rescue import under_caps

    from outages import map_each_tensor

    map_each_tensor()
    yield _squeezed(_part(200, share))
    capped = under_caps()
    attempts = Counter({"plans tried": sum(sum(tried) for tried in capped["attempts"].values())})
    yield _row("out of memory, a cap that stays", capped["trainings"], attempts, capped["differences"])


def _squeezed(wanted: int) -> Row:
    """Real failures of the allocator, until there are enough."""
    from outages import Job, differing, squeezed, undisturbed

    failures, wrong = Counter[str](), list[str]()
    for name, rows in (("whole", 4096), ("in parts", 8192)):
        job = Job.named(name, rows)
        expected, ops = undisturbed(job, 6)
        for seed in range(20 * wanted):
            training, raised = squeezed(job, 6, ops, random.Random(seed))
            failures[f"{name}: trainings"] += 1
            failures[f"{name}: failed allocations"] += len(training.step.rescues) + raised
            failures["no memory to rescue either: raised, and called again"] += raised
            if training.losses != expected.losses:
                wrong.append(f"{name}, training {seed}: losses")
            wrong += [
                f"{name}, training {seed}: {what}" for what in differing(training.state(), expected.state())
            ]
            if failures[f"{name}: failed allocations"] >= wanted // 2:
                break
    cases = sum(failures[f"{name}: failed allocations"] for name in ("whole", "in parts"))
    return _row("out of memory, hard cap moved at a random op", cases, failures, wrong)


def files(share: float) -> Iterator[Row]:
    """Hostile plans, profiles, runs and checkpoints by Hypothesis; then attacks in the names of modules."""
    import hypothesis.strategies as st
    from hypothesis import HealthCheck, Phase, given, settings

    from hostile import KINDS, Files, Watch

    wrong, seconds = list[str](), [0.0]
    with _folder() as folder:
        made, watch = Files(folder), Watch(folder)
        cases = Counter[str]()

        def run(name: str, case: Callable[[], None]) -> None:
            cases["all"] += 1
            start_s = time.perf_counter()
            try:
                with watch:
                    case()
            except Exception as error:
                wrong.append(f"{name}: {type(error).__name__}: {error!s:.200}")
            seconds.append(time.perf_counter() - start_s)

        @settings(
            max_examples=_part(10_000, share),
            database=None,
            derandomize=True,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(st.sampled_from(KINDS), st.integers(0, 2**64))
        def hostile(kind: str, seed: int) -> None:
            run(f"{kind} {seed}", lambda: made.case(kind, seed))

        before_bytes = _most_bytes()
        hostile()
        for seed in range(_part(50, share)):
            run(f"names {seed}", lambda seed=seed: made.names(seed))
        grown_bytes = _most_bytes() - before_bytes
        wrong += watch.heard + made.strangers()
    if max(seconds) > _SLOW_S or grown_bytes > _LARGE_BYTES:
        wrong.append(f"a case took {max(seconds):.1f} s, or all of them {grown_bytes} B")
    counts = {**made.outcomes, "slowest_s": round(max(seconds), 3), "grown_bytes": grown_bytes}
    yield _row("hostile file", cases["all"], counts, wrong)
    yield _changed_profiles(_part(200, share))


def _changed_profiles(cases: int) -> Row:
    """Training with a stored profile that somebody changed."""
    from hostile import Files, wrong_gradients

    with _folder() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = Files(folder)
        wrong = wrong_gradients(lambda draw: made._text(made.texts["profile"], draw), range(cases))
    return _row("training with a changed profile", cases, {}, wrong)


def steps(share: float) -> Iterator[Row]:
    """Ten thousand steps of each of two trainings: nothing may pile up."""
    from outages import Job
    from steady import least_peak, levels

    for name in ("whole", "in parts"):
        job, wrong = Job.named(name), list[str]()
        found = levels(
            job, _part(10_000, share), _part(1000, share), least_peak(job.profile, job.micro_batch_size)
        )
        first, last = found[0], found[-1]
        grown = {
            "live_bytes": last.live_bytes - first.live_bytes,
            "resident_bytes": last.resident_bytes - first.resident_bytes,
            "objects": last.objects - first.objects,
        }
        if grown["live_bytes"] > _FLAT_BYTES or grown["resident_bytes"] > _FLAT_RESIDENT_BYTES:
            wrong.append(f"it grows: {grown}")
        yield _row(f"steps of one training, batch {name}", last.step, grown, wrong)


def threads(share: float) -> Iterator[Row]:
    """Two models trained in two threads at once."""
    from steady import in_threads

    pairs, each = _part(20, share), 50
    yield _row("two models in two threads", pairs, {"steps of each": each}, in_threads(pairs, each))


def users(share: float) -> Iterator[Row]:
    """Errors in the user's own loss, batch and hooks."""
    from outages import Job, undisturbed
    from steady import PLACES, broken

    wrong, trainings = list[str](), _part(25, share)
    raised = Counter[str]()
    for name in ("whole", "in parts"):
        job = Job.named(name)
        expected, _ = undisturbed(job, 10)
        for seed in range(trainings):
            wrong += [f"{name}, {seed}: {what}" for what in broken(job, seed, 10, expected, raised)]
    assert set(raised) <= set(PLACES)
    yield _row("error in the user's loss, hooks or batch", raised.total(), raised, wrong)


def command_lines(share: float) -> Iterator[Row]:
    """Generated arguments of every command."""
    from commands import arguments, prepare, problem

    codes, wrong = Counter[str](), list[str]()
    with _folder() as folder, chdir(folder):  # an odd word may name a new folder
        prepare(folder)
        cases = _part(500, share)
        for seed in range(cases):
            code, what = problem(arguments(random.Random(seed), folder))
            codes[str(code)] += 1
            wrong += [f"{seed}: {what}"] if what else []
    yield _row("generated command line", cases, codes, wrong)


PARTS: dict[str, Callable[[float], Iterator[Row]]] = {
    "kills": kills,
    "full_disks": full_disks,
    "outages": outages,
    "moved_caps": moved_caps,
    "files": files,
    "steps": steps,
    "threads": threads,
    "users": users,
    "command_lines": command_lines,
}


def _row(fault: str, cases: int, counts: Counter[str] | dict[str, Any], wrong: list[str]) -> Row:
    return {"fault": fault, "cases": cases, "counts": dict(sorted(counts.items())), "wrong": wrong}


def _part(cases: int, share: float) -> int:
    return max(2, math.ceil(cases * share))


def _most_bytes() -> int:
    """The most memory that this process has taken."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _in_a_process(part: str, share: float) -> Iterator[Row]:
    """The rows of a part, as it finds them."""
    own = [sys.executable, __file__, "--part", part, "--share", str(share)]
    alone = shutil.which("unshare")  # what it mounts goes with it
    if alone and part == "full_disks" and subprocess.run([alone, "-m", "true"], check=False).returncode == 0:
        own = [alone, "-m", *own]
    start_s = time.monotonic()
    with subprocess.Popen(own, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith('{"fault"'):
                yield json.loads(line) | {"seconds": round(time.monotonic() - start_s)}
                start_s = time.monotonic()
    if child.returncode:
        yield _row(part, 0, {}, [f"it ended with {child.returncode}"])


def _earlier(path: Path) -> list[Row]:
    """The rows of a result, each with its commit; none of a part that crashed and was run again."""
    data = json.loads(path.read_text())
    return [{"commit": data["provenance"]["commit"], **row} for row in data["rows"] if row["cases"]]


def _write(rows: list[Row], out: Path | None) -> None:
    """Writes what there is: a stop loses nothing."""
    if out:
        out.write_text(json.dumps({"provenance": provenance(), "rows": rows}, indent=1))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--share", type=float, default=1.0, help="of the cases")
    parser.add_argument("--also", nargs="*", type=Path, default=[], help="results of other parts, run apart")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    logging.getLogger("memfit").setLevel(logging.ERROR)
    if options.part:
        for row in PARTS[options.part](options.share):
            print(json.dumps(row), flush=True)
        return
    rows = [*{row["fault"]: row for path in options.also for row in _earlier(path)}.values()]
    for part in options.only:
        for row in _in_a_process(part, options.share):
            rows.append(row | {"commit": provenance()["commit"]})
            print(json.dumps(row, indent=1), flush=True)
            _write(rows, options.out)
    _write(rows, options.out)
    if any(row["wrong"] for row in rows):
        raise SystemExit("a promise was broken")


if __name__ == "__main__":
    main()
