"""`make demo`: a training step that does not fit into memory, and the same step made to fit, in 3 minutes.

A byte-level GPT learns Python's own standard library, 64 rows at a time. Every run is a child process of
`memfit train`, so that a hard cap of the operating system binds it alone. Nothing here is simulated.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from memfit.core.batching import parts_for
from memfit.report.terminal import facts, recomputed_share, sparkline
from memfit.units import format_bytes, format_seconds

# What the process may add once torch is loaded. More than the budget, for it binds more than tensors: the
# recording, the solver, the allocation trace of the first steps, buffers of the math library, free lists.
CAP = "800MiB"
STEPS, PLAIN_STEPS = 20, 14  # enough to see the same curve
# The same in every run, and no number depends on it. Threads wait without spinning, else a busy machine slows
# to a crawl. glibc gives blocks above 1 MiB back at once: by default 400 MiB of tensors would hold 1 GiB.
GLIBC = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
ENVIRONMENT = {**os.environ, **GLIBC, "OMP_WAIT_POLICY": "PASSIVE", "KINETO_LOG_LEVEL": "6"}


class Job(NamedTuple):
    """What is trained: a TARGET, the rows of its effective batch, and the budget."""

    target: str
    rows: int
    memory: str


TEXT = Job("memfit.workloads.text:workload", 64, "400MiB")
IMAGES = Job("memfit.workloads.images:workload", 32, "200MiB")

console = Console(width=110 if not sys.stdout.isatty() else None)


def main() -> int:
    """Shows the five parts and returns 0 if each came out as promised."""
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder)
        console.rule(f"a. The plain step under a hard cap of {CAP}", align="left")
        died, _ = train(TEXT, runs / "capped", STEPS, "--plain", "--hard-cap", CAP)
        console.rule(f"b. The same under the same cap, with memfit and --memory {TEXT.memory}", align="left")
        options = ("--memory", TEXT.memory, "--hard-cap", CAP)
        fits, result = train(TEXT, runs / "memfit", STEPS, *options)
        if died != 4 or fits != 0:
            console.print(f"Not as promised: the plain run ended with code {died}, memfit's with {fits}.")
            return 1
        console.rule("c. What it costs, against the plain step without any cap", align="left")
        _, plain = train(TEXT, runs / "plain", PLAIN_STEPS, "--plain")
        exact = show_costs(TEXT, result, plain)
        console.rule("d. The same curve", align="left")
        show_losses(losses(runs / "plain"), losses(runs / "memfit"))
        console.rule("e. BatchNorm must see its batch whole: here memfit recomputes", align="left")
        _, plain = train(IMAGES, runs / "images-plain", 4, "--plain")
        _, whole = train(IMAGES, runs / "images", 6, "--memory", IMAGES.memory)
        exact = show_costs(IMAGES, whole, plain) and exact
    console.print(f"\nDone in {format_seconds(time.monotonic() - started_s)}.")
    return 0 if result["held"] and whole["held"] and exact else 1


def train(job: Job, out: Path, steps: int, *options: str) -> tuple[int, dict[str, Any]]:
    """Runs `memfit train` in a child, its progress shown live; returns its exit code and its result."""
    arguments = ["train", job.target, "--batch-size", str(job.rows), "--steps", str(steps), *options]
    console.print("$ memfit", *arguments, style="bold", highlight=False)
    command = [sys.executable, "-m", "memfit", *arguments, "--out", str(out), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, env=ENVIRONMENT, text=True, check=False)
    return done.returncode, json.loads(done.stdout or "{}")


def losses(run: Path) -> list[float]:
    """Returns the losses of a run in order."""
    return [json.loads(line)["loss"] for line in (run / "losses.jsonl").read_text().splitlines()]


def compare(wanted: Job, micro_batch_size: int) -> dict[str, float]:
    """Runs one batch with memfit and plainly at the same micro-batch; returns the differences."""
    import torch

    import memfit
    from memfit.workload import load_target

    job = load_target(wanted.target, batch_size=wanted.rows)
    model, optimizer, batch = job.model, job.optimizer, next(job.batches_from(0))
    step = memfit.fit(
        model,
        job.loss_fn,
        batch,
        memory=wanted.memory,
        optimizer=optimizer,
        micro_batch_size=micro_batch_size,
    )
    found = []
    for body in (step, lambda whole: accumulate(job, whole, wanted.rows, micro_batch_size)):
        torch.manual_seed(0)  # the same dropout
        optimizer.zero_grad()
        loss = body(batch)
        found.append([loss, *(parameter.grad for parameter in model.parameters())])
    apart = [float((one - two).abs().max()) for one, two in zip(*found, strict=True)]
    return {"loss": apart[0], "gradient": max(apart[1:])}


def accumulate(job: Any, batch: dict[str, Any], total_rows: int, size: int) -> Any:
    """Runs the plain step in equal parts of at most `size` rows, as everybody writes it; returns the loss."""
    start, total = 0, 0.0
    for rows in parts_for(total_rows, size):
        part = {name: tensor[start : start + rows] for name, tensor in batch.items()}
        loss = job.loss_fn(job.model, part) * (rows / total_rows)
        loss.backward()
        start, total = start + rows, total + loss.detach()
    return total


def show_costs(job: Job, result: dict[str, Any], plain: dict[str, Any]) -> bool:
    """Prints the table of budget, peaks, plan, slowdown and exactness; returns whether it is exact."""
    exact = compare(job, result["micro_batch_size"])
    slower = result["median_step_s"] / plain["median_step_s"]
    times = f"{format_seconds(result['median_step_s'])} against {format_seconds(plain['median_step_s'])}"
    rows = [
        ("plain step needs (allocator)", format_bytes(plain["measured_peak_bytes"])),
        ("budget", format_bytes(result["budget_bytes"])),
        ("predicted peak", format_bytes(result["predicted_peak_bytes"])),
        ("measured peak (allocator)", format_bytes(result["measured_peak_bytes"])),
        ("micro-batch x steps", f"{result['micro_batch_size']} x {result['gradient_accumulation_steps']}"),
        ("forward recomputed", recomputed_share(result["recompute_s"], result["forward_s"])),
        ("certified gap", f"at most {result['optimality_gap']:.2%} of a step from the best such plan"),
        ("slowdown", f"{slower:.2f} x the plain step without a cap ({times})"),
        ("largest difference of the loss", f"{exact['loss']:g} from the plain step at the same micro-batch"),
        ("largest difference of a gradient", f"{exact['gradient']:g}"),
    ]
    console.print(facts("", rows))
    return exact["loss"] == exact["gradient"] == 0


def show_losses(plain: list[float], memfit: list[float]) -> None:
    """Prints both curves."""
    table = Table("step", "plain, no cap", f"memfit in {TEXT.memory}", box=None)
    for index in (0, 2, 4, 6, 9, 11, 13, 16, 19):
        left = f"{plain[index]:.4f}" if index < len(plain) else ""
        table.add_row(str(index + 1), left, f"{memfit[index]:.4f}")
    console.print(table)
    console.print(f"plain  {sparkline(plain)}\nmemfit {sparkline(memfit)}")
    console.print("(In parts, dropout draws other masks than for the whole, so the last digits differ.)")


if __name__ == "__main__":
    sys.exit(main())
