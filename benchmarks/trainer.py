"""The Hugging Face Trainer with memfit against the plain one at the whole batch, in many trainings.

    OMP_NUM_THREADS=1 python benchmarks/trainer.py [--out FILE]

Each row is a model, data, arguments and a plan: 30 steps of 16 rows, the last of an epoch with 6, on a CPU.
It reports the worst relative difference of losses, gradient norms and parameters, and whether learning rates,
step counts and the sequence of events are the same. Fails if a difference is above rounding.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from provenance import publish

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import trainers

LARGEST = 1e-5
PLANS: dict[str, dict[str, Any]] = {
    "micro-batches of 3": {"memory": "1GiB", "micro_batch_size": 3},
    "micro-batches of 1": {"memory": "1GiB", "micro_batch_size": 1},
    "whole, recomputing": {"share": 0.9, "micro_batch_size": 16},
    "half the memory, memfit's choice": {"share": 0.5},
}
JOBS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (trainers.llama, trainers.texts, {}),
    "llama, rows of many lengths": (trainers.llama, trainers.ragged, {"data_collator": trainers.padded}),
    "llama, a stream": (trainers.llama, lambda: trainers.Stream(trainers.texts()), {}),
    "llama, LoRA": (trainers.lora, trainers.texts, {}),
    "llama, SGD, label smoothing": (
        trainers.llama,
        trainers.texts,
        {"arguments": {"optim": "sgd", "label_smoothing_factor": 0.1}},
    ),
    "llama, Adafactor": (trainers.llama, trainers.texts, {"arguments": {"optim": "adafactor"}}),
    "llama, drop_last, clipped": (
        trainers.llama,
        trainers.texts,
        {"arguments": {"dataloader_drop_last": True, "max_grad_norm": 0.05}},
    ),
    "bert, classes": (trainers.bert, trainers.classified, {}),
    "bert, a class for each word": (trainers.tagger, trainers.tagged, {}),
}


def differences(run: trainers.Run, expected: trainers.Run) -> dict[str, Any]:
    """What two trainings differ in."""
    norms = [torch.tensor(one.logged("grad_norm")) for one in (run, expected)]
    listed = ("learning_rate", "epoch")
    return {
        "losses": float(((run.losses - expected.losses) / expected.losses).abs().max()),
        "grad_norms": float(((norms[0] - norms[1]) / norms[1]).abs().max()),
        "weights": trainers.worst_weight(run, expected),
        "same_schedule": run.logged(*listed) == expected.logged(*listed),
        "same_events": run.listener.events == expected.listener.events,
        "steps": run.trainer.state.global_step,
    }


def measured(where: Path) -> list[dict[str, Any]]:
    """All trainings."""
    rows = []
    for name, (model, data, given) in JOBS.items():
        expected = trainers.plain(where, model(), data(), **given)
        whole_bytes = 0
        for plan, options in PLANS.items():
            if "share" in options:
                if not whole_bytes:
                    whole = trainers.fitted(
                        where, model(), data(), {"memory": "1GiB", "micro_batch_size": 16}, **given
                    )
                    assert whole.fitted is not None
                    whole_bytes = whole.fitted.plan.predicted_peak_bytes
                options = {"memory": int(options["share"] * whole_bytes)} | {
                    key: value for key, value in options.items() if key != "share"
                }
            start_s = time.perf_counter()
            run = trainers.fitted(where, model(), data(), options, **given)
            assert run.fitted is not None
            assert run.fitted.verdict is not None
            found = run.fitted.plan
            row = {"job": name, "plan": plan, "micro_batch_size": found.micro_batch_size}
            row |= {"recomputed_tensors": found.recomputes, "budget_bytes": found.budget_bytes}
            row |= {"held": run.fitted.verdict.held} | differences(run, expected)
            rows.append(row | {"seconds": round(time.perf_counter() - start_s, 1)})
            print(rows[-1], file=sys.stderr, flush=True)
    wrong = [row for row in rows if not is_right(row)]
    if wrong:
        raise SystemExit(f"{len(wrong)} of {len(rows)} trainings differ: {wrong}")
    return rows


def is_right(row: dict[str, Any]) -> bool:
    """Whether a training is the plain one, to rounding."""
    is_close = max(row["losses"], row["grad_norms"], row["weights"]) <= LARGEST
    return is_close and row["same_schedule"] and row["same_events"] and row["held"] and row["steps"] == 30


if __name__ == "__main__":
    logging.getLogger("memfit").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        publish(__doc__, lambda: measured(Path(folder)))
