"""Measures real steps of few rows: seconds and inner temporaries of each op. See Note [Profiling]."""

from __future__ import annotations

import logging
import math
from typing import Final

import torch

from memfit.core.costs import Measured, measured, quicker
from memfit.core.devices import Roofline
from memfit.core.graph import Residents
from memfit.core.timeline import run as simulate_run
from memfit.errors import MemfitError
from memfit.runtime.batch import rows_of
from memfit.runtime.fake import Faker, faked, mode_for
from memfit.runtime.job import Job, first_rows, prepare_gradients, record_few, record_part
from memfit.runtime.probe import MaterialProbe, probe_for
from memfit.runtime.record import Recording
from memfit.runtime.sizes import faker_for

_log = logging.getLogger("memfit")

_FEW_ROWS = 4
_QUICK_S = 0.6
SMALL_BYTES: Final = 1 << 30  # may be taken to measure where no limit is known
_REPEATS = 3
_SOME = 4096  # bytes of temporaries worth a look
_MOST_S = 3.0


def measurable_rows(
    recordings: list[Recording], residents: Residents, rows: int, limit_bytes: int | None
) -> int:
    """The most rows of which a plain step can be measured in the memory there is; at least 1."""
    smallest = min(recordings, key=lambda r: r.graph.rows).graph
    largest = max(recordings, key=lambda r: r.graph.rows).graph
    low_bytes, high_bytes = (simulate_run(g).peak.total_bytes for g in (smallest, largest))
    free_bytes = SMALL_BYTES if limit_bytes is None else limit_bytes - residents.total_bytes
    if largest.rows == smallest.rows:  # of one size only the proportion is known; gradients are residents
        return max(1, min(rows, int(largest.rows * free_bytes / max(1, high_bytes))))
    per_row = (high_bytes - low_bytes) / (largest.rows - smallest.rows)
    free_bytes -= low_bytes
    fitting = smallest.rows + int(max(0.0, free_bytes) / per_row) if per_row > 0 else rows
    return max(1, min(rows, fitting))


def measure(job: Job, place: torch.device, most_rows: int) -> tuple[Measured, Measured] | None:
    """Real steps at two numbers of rows, as large as is quick; None where they cannot be run."""
    size = min(_FEW_ROWS, most_rows)
    large = _measured_at(job, place, size)
    if large is None and most_rows == rows_of(job.batch):  # it may run with the rows it is written for only
        large = _measured_at(job, place, most_rows)
        return None if large is None else (large, large)
    while large is not None and sum(large.seconds.values()) < _QUICK_S and 2 * size <= most_rows:
        size = min(4 * size, most_rows)
        large = _measured_at(job, place, size) or large
    small = _measured_at(job, place, max(1, size // 2))
    if large is None or small is None:
        return (small or large, small or large) if small or large else None  # type: ignore[return-value]
    return small, large


def temporaries_at(
    job: Job, place: torch.device, known: Measured, rows: int, free_bytes: float | None
) -> Measured | None:
    """Inner temporaries at another number of rows, of ops that have some; None if there are none to know.

    The step runs on fakes and only those ops really, one at a time: they need no more memory than the step.
    """
    total = rows_of(job.batch)
    count = -(-total // rows)
    limit = math.inf if free_bytes is None else free_bytes
    wanted = frozenset(
        key.op.split(" of ")[0] for key, size in known.temporary_bytes.items() if size >= _SOME
    )
    if not wanted or known.rows == rows:
        return None
    faker = Faker(mode_for(job.model))
    with faked(job.model, faker), faker.mode:
        prepare_gradients(job.model, resident=count > 1)
        fake = job._replace(batch=faker.batch(job.batch))
        probe = MaterialProbe(Roofline(), place, wanted, limit, _MOST_S)
        run = record_part(fake, fake.batch, total, count, probe, resident=count > 1)
    return measured(run.graph, run.signatures, run.peaks)


def measured_alone(job: Job, place: torch.device, most_rows: int, free_bytes: float | None) -> list[Measured]:
    """Every op of a step run alone at two or three numbers of rows, none at all of the step itself.

    For a model of which no rank has all parameters. Seconds are those of ops on an idle device.
    """
    total = rows_of(job.batch)
    limit = math.inf if free_bytes is None else free_bytes
    found = []
    for rows in sorted({min(2, most_rows), min(_FEW_ROWS, most_rows), most_rows}):
        part = first_rows(job.batch, total, rows)
        faker = faker_for(job)
        with faked(job.model, faker), faker.mode:
            prepare_gradients(job.model, resident=False)
            fake = job._replace(batch=faker.batch(part))
            probe = MaterialProbe(Roofline(), place, None, limit, _MOST_S)
            run = record_part(fake, fake.batch, rows, 1, probe, resident=False)
        found.append(measured(run.graph, run.signatures, run.peaks))
    return found


def _measured_at(job: Job, place: torch.device, few: int) -> Measured | None:
    """The quickest of some real steps, op by op; the first step pays for what is built once."""
    best: Measured | None = None
    try:
        for repeat in range(1 + _REPEATS):
            run = record_few(job, few, probe_for(place), hold_saved=True)
            if repeat:
                point = measured(run.graph, run.signatures, run.peaks)
                best = point if best is None else quicker(best, point)
                if sum(point.seconds.values()) > _QUICK_S:
                    break
    except MemfitError:
        raise
    except Exception as error:
        _log.info("no measurement at %d rows: %s", few, error)
    prepare_gradients(job.model, resident=False)
    return best
