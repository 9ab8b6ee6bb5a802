"""Lightning with memfit against the plain Trainer with the whole batch: 30 steps, the last of an epoch short.

    OMP_NUM_THREADS=1 python benchmarks/lightning_trainer.py [--out FILE]

BERT (classification) and Llama from configurations, dropout off, each with SGD and AdamW, without and with
clipping, with micro-batches of several sizes and with the whole batch recomputed. One row a run: the largest
relative difference of the logged losses and rates, of the final weights (each tensor by its norm), whether
step counts and the order of all hooks are the same, and the peak. The biases of BERT's keys are apart: their
gradient is rounding alone, in the plain Trainer too, and AdamW makes whole steps of it.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from provenance import publish

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from lightning_jobs import Record, Task, bert, llama, sentences, train, worst_difference
from memfit.integrations.lightning import MemfitCallback

ROWS, BATCHES, SHORT, EPOCHS = 16, 9, 7, 3
MODELS = {"bert": (bert, "1.1MiB"), "llama": (llama, "1.6MiB")}
OPTIMIZERS = {"SGD": {"lr": 0.1, "momentum": 0.9}, "AdamW": {"lr": 1e-3}}
Row = dict[str, Any]


def rows() -> Iterator[Row]:
    """Every model, optimizer, clipping and micro-batch."""
    for name, (make, memory) in MODELS.items():
        data = sentences(ROWS * BATCHES + SHORT, causal=name == "llama")
        for optimizer, options in OPTIMIZERS.items():
            for clip in (None, 0.5):
                torch.manual_seed(0)
                start = Task(make(), optimizer, **options)
                plain = copy.deepcopy(start)
                course = train(plain, data, max_epochs=EPOCHS, gradient_clip_val=clip)
                for size in (1, 3, 5, 8, ROWS):
                    task, callback = copy.deepcopy(start), MemfitCallback(memory, micro_batch_size=size)
                    found = train(task, data, callback, max_epochs=EPOCHS, gradient_clip_val=clip)
                    about = {"model": name, "optimizer": optimizer, "clip": clip, "micro_batch_size": size}
                    weights = {"weights": worst_difference(task, plain)}
                    weights["key_biases"] = worst_difference(task, plain, key_biases=True)
                    yield about | compared(found, course, callback) | weights


def compared(found: Record, plain: Record, callback: MemfitCallback) -> Row:
    """One run beside the plain one."""
    step = callback.step
    assert step is not None
    assert step.verdict is not None
    pairs = list(zip(found.batches, plain.batches, strict=True))
    return {
        "steps": len(pairs),
        "recomputed": step.plan.recomputes,
        "losses": _worst(pairs, ("loss_step", "loss_epoch", "val_loss", "returned", "gradient")),
        "rates": _worst(pairs, ("rate",)),
        "same_step_counts": all(a["step"] == b["step"] for a, b in pairs),
        "same_hooks": found.events == plain.events,
        "held": step.verdict.held,
        "predicted_over_measured": step.verdict.predicted_peak_bytes / step.verdict.measured_peak_bytes,
    }


def _worst(pairs: list[tuple[dict[str, float], dict[str, float]]], names: tuple[str, ...]) -> float:
    """The largest relative difference of what was seen under some names."""
    return max(
        abs(found[name] - plain[name]) / abs(plain[name])
        for found, plain in pairs
        for name in names
        if name in plain
    )


def measured() -> list[Row]:
    """All rows, without Lightning's advice."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(rows())


if __name__ == "__main__":
    publish(__doc__, measured)
