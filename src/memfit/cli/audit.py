"""`memfit audit`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from memfit.cli.ending import EXIT_INEXACT, interruptible, progress, show, show_json
from memfit.cli.options import AsJson, BatchSize, Device, Quiet, Seed, Target
from memfit.report.tables import audit_table, audit_verdict
from memfit.workload import DEFAULT_TARGET

if TYPE_CHECKING:
    from memfit.core.audit import Audit


def audit(
    target: Target = DEFAULT_TARGET,
    *,
    batch_size: BatchSize = None,
    seed: Seed = 0,
    device: Device = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Prove on a few rows of TARGET whether gradients of micro-batches add up; exit code 7 if they do not."""
    with interruptible():
        progress(quiet=quiet).print(f"building {target}, and running a few of its rows in parts", style="dim")
        found, two_passes = _audited(target, batch_size, seed, device)
    is_exact = found.is_exact or (two_passes is not None and two_passes.is_exact)
    if as_json:
        more = {"is_exact": is_exact, "reason": None if is_exact else found.reason}
        show_json("audit", found.to_data() | more | {"two_passes": two_passes and two_passes.to_data()})
    else:
        if not quiet:
            show(audit_table(found, target))
            if two_passes is not None:
                show(audit_table(two_passes, "in two passes"))
        show(audit_verdict(found, target, two_passes))
    if not is_exact:
        raise typer.Exit(EXIT_INEXACT)


def _audited(
    target: str, batch_size: int | None, seed: int, device: str | None
) -> tuple[Audit, Audit | None]:
    """The audit of the loss, and of two passes where it is not exact and the outputs are given apart."""
    import torch

    from memfit.api import audit
    from memfit.runtime.micro import whole_loss
    from memfit.runtime.normalisation import by_rows
    from memfit.runtime.rowwise import SumOverRows
    from memfit.workload import load_target

    torch.manual_seed(seed)
    work = load_target(target, batch_size=batch_size, seed=seed, device=device)
    work.model.train()
    batch = next(work.batches_from(0))
    loss_fn = whole_loss(work.loss_fn, work.outputs_fn)
    with by_rows(work.model, work.batch_norm):  # as fit asks: what the workload says need not be exact
        found = audit(work.model, loss_fn, batch, optimizer=work.optimizer)
        if found.is_exact or work.outputs_fn is None:
            return found, None
        return found, audit(work.model, SumOverRows(work.outputs_fn), batch, optimizer=work.optimizer)
