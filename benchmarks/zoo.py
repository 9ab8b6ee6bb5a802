"""Every model: families of ``transformers`` and models with hard control flow, at three budgets each.

    OMP_NUM_THREADS=1 python benchmarks/zoo.py [--models llama packed_lstm] [--resume] [--out FILE]

The models of ``tests/every.py``, the batch whole, from the least memory to no recomputation. Loss, gradients,
buffers and random state are compared with those of the plain step to the bit; peaks are the CPU allocator's
own, of one step under a prediction that no run has corrected. Where that was too low, a step that meters
itself, as each first one does, is to plan again or to name the memory that is enough, which it is then given.
Fails if anything differs, a peak is above its budget, or memfit raises what it does not raise by design.
Results are written after each model, with its commit; ``--resume`` keeps those that are in the file, but for
models that were not built.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from provenance import provenance

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from every import every_model
from heads import quiet
from judged import Judgement, Specimen, judged

LIMIT_S = 40  # of CPU time, for a model


class OutOfTime(BaseException):
    """The model's time is over; nothing that catches errors may catch it."""


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raises in the body once it has taken that much CPU time, and again if that was lost in a callback."""

    def end(*_: object) -> None:
        raise OutOfTime

    former = signal.signal(signal.SIGPROF, end)
    signal.setitimer(signal.ITIMER_PROF, seconds, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, former)


def row_of(name: str, heads: list[Specimen]) -> dict[str, Any]:
    """What became of a model: of its first head that builds."""
    start_s, untold = time.process_time(), []
    found, kind = Judgement("not built", ""), heads[0].kind
    try:
        with limited(LIMIT_S), quiet():
            for head in heads:
                found, kind = judged(head), head.kind
                if found.status != "not built":
                    break
                untold.append(f"{kind}: {found.reason}")
    except OutOfTime:
        found = Judgement("out of time", f"not done within {LIMIT_S} s of CPU time")
    told = asdict(found)
    if found.status == "not built":
        told["reason"] = untold[0]
    took_s = round(time.process_time() - start_s, 1)
    return {"model": name, "kind": kind, **told, "is_kept": found.is_kept, "cpu_s": took_s}


def line(row: dict[str, Any]) -> str:
    """What became of a model, for people."""
    ratios = " ".join(f"{run['first_ratio']:.4f}" for run in row["runs"])
    mended = " mended" if any(run["is_mended"] for run in row["runs"]) else ""
    kept = "kept" if row["is_kept"] else "BROKEN"
    return (
        f"{row['kind']:23} {row['model']:45} {row['status']:11} {kept:6} {row['cpu_s']:5.1f} s  {ratios}"
        f"{mended}  {row['reason'][:100]}"
    )


def main() -> None:
    """Prints a line a model and what became of them; writes the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+")
    parser.add_argument("--layers", type=int, default=2, help="of heads made from generic configurations")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    made, rows = provenance(), {}
    if options.resume and options.out.exists():
        former = json.loads(options.out.read_text())["rows"]
        rows = {row["model"]: row for row in former if row["status"] != "not built"}
    for name, heads in every_model(options.layers):
        if name in rows or (options.models and name not in options.models):
            continue
        rows[name] = {**row_of(name, heads), "commit": made["commit"]}
        print(line(rows[name]), flush=True)
        if options.out:
            part = options.out.with_suffix(".part")
            part.write_text(json.dumps({"provenance": made, "rows": list(rows.values())}, indent=0))
            part.replace(options.out)
    print(
        ", ".join(
            f"{count} {status}" for status, count in Counter(r["status"] for r in rows.values()).items()
        )
    )
    broken = [row["model"] for row in rows.values() if not row["is_kept"]]
    sys.exit(f"{len(broken)} of {len(rows)} models broken: {', '.join(broken)}" if broken else 0)


if __name__ == "__main__":
    main()
