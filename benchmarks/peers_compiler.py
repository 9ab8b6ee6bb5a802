"""The compiler's ``activation_memory_budget``, swept: the peak that comes of each, and what it costs.

    OMP_NUM_THREADS=1 python benchmarks/peers_compiler.py [--out FILE]

The GPT-2 of ``peers.py`` compiled by inductor as a whole. A budget is a share of what the compiler would
save; its measured peak is beside it. An error of the compiler is recorded as it is.
"""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from typing import Any

import torch
import torch._functorch.config as partitioner
from peer_models import JOBS, own_loss
from peers import ROUNDS, Bench, Row, Setting, in_turn, keep_freed_memory
from provenance import publish

BUDGETS = (1.0, 0.6, 0.3, 0.15, 0.05)


def compiled(bench: Bench, budget: float) -> Setting:
    """The model compiled under a budget, warm."""
    torch._dynamo.reset()
    partitioner.activation_memory_budget = budget  # type: ignore[assignment]
    twin = copy.copy(bench.model)  # the same parameters, code of its own
    fast: Any = torch.compile(twin)
    setting = Setting("compiler", f"{budget}", lambda: own_loss(fast, bench.batch).backward())
    start_s = time.perf_counter()
    for _ in range(2):
        bench.begin()
        setting.run()
    setting.row["compile_s"] = time.perf_counter() - start_s
    return setting


def measure() -> list[Row]:
    """One row a budget, and the plain eager step."""
    warnings.simplefilter("ignore")
    keep_freed_memory()
    bench = Bench(JOBS["gpt2"], "cpu")
    rows: list[Row] = []
    plain = Setting("plain", "plain", bench.plain)
    for budget in (None, *BUDGETS):
        try:
            setting = plain if budget is None else compiled(bench, budget)
            bench.measure(setting, None)
            in_turn(bench, [setting], ROUNDS)  # each is compiled anew, so they cannot take turns
        except Exception as error:  # whatever the compiler raises is the result
            said = str(error).strip().splitlines()
            error_row = {"error": type(error).__name__, "said": said[0][:200] if said else ""}
            rows.append({"peer": "compiler", "name": f"{budget}", **error_row})
            continue
        rows.append(setting.row | {"cpu_s": statistics.median(setting.cpu_s)})
        print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    publish(__doc__, measure)
