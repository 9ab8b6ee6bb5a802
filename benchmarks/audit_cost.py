"""CPU seconds of an audit of GPT-2 with 12 layers, at the batch that fit() would split.

    OMP_NUM_THREADS=1 python benchmarks/audit_cost.py [--out FILE]

Seconds of processor time of this process, so that other work on the machine counts little; the least of a
few runs. Once a model: the audit is stored with the profile.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from provenance import publish
from torch import Tensor, nn
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel

import memfit

ROWS, REPEATS = 8, 3


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    """The loss that the model computes itself."""
    loss: Tensor = model(**batch).loss
    return loss


def coupled(model: nn.Module, batch: Any) -> Tensor:
    """A loss over all pairs of rows: nothing is proved, and the audit looks for the reason."""
    pooled = functional.normalize(model(input_ids=batch["input_ids"]).logits.mean(1), dim=1)
    return (pooled @ pooled.T / 0.1).logsumexp(1).mean()


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """The least processor time of a few runs, and the last result."""
    times = []
    for _ in range(REPEATS):
        start_s = time.process_time()
        result = work()
        times.append(time.process_time() - start_s)
    return min(times), result


def measure() -> list[dict[str, Any]]:
    """One row a length and loss."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).train()
    rows = []
    for tokens, loss in ((128, loss_fn), (256, loss_fn), (128, coupled)):
        ids = torch.randint(5, 50_000, (ROWS, tokens))
        batch = {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}

        def audited(loss: Any = loss, batch: Any = batch) -> memfit.Audit:
            return memfit.audit(model, loss, batch)

        first_s, found = seconds(audited)
        rows.append(
            {
                "model": "GPT-2, 12 layers",
                "loss": loss.__name__,
                "rows": ROWS,
                "tokens": tokens,
                "audit_cpu_s": first_s,
                "kind": found.kind.value,
                "counter": found.counter,
                "worst_error": found.worst_error,
                "notes": list(found.notes),
            }
        )
    return rows


if __name__ == "__main__":
    publish(__doc__, measure)
