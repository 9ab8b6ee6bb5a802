"""What ``peers.py`` measured, as tables: memfit's extra time over the best peer's in the same memory."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any, NamedTuple

from figures import newest

from memfit.units import format_bytes

Found = dict[str, Any]
# Ways to run the batch whole. Those that split it have budgets of their own in the result.
WHOLE = ("every k-th block", "selective", "transformers", "Rotor")
_OTHERS = ("plain", *WHOLE)


class Duel(NamedTuple):
    """memfit and the best peer that fits in one budget."""

    budget_bytes: int
    peer: str
    memfit_s: float
    peer_s: float

    @property
    def ratio(self) -> float:
        """memfit's extra seconds over the peer's."""
        return self.memfit_s / self.peer_s


def models() -> list[str]:
    """Those that were run, in their order."""
    return list(dict.fromkeys(row["model"] for row in newest("peers")[0]))


def of(model: str) -> list[Found]:
    """The rows of a model."""
    return [row for row in newest("peers")[0] if row["model"] == model]


def measured(model: str, peers: tuple[str, ...]) -> list[Found]:
    """The settings of some peers, with their peaks."""
    return [row for row in of(model) if row["peer"] in peers and "peak_bytes" in row]


def duels(model: str, seconds: str) -> Iterator[Duel]:
    """At every budget in which a peer fits; ``seconds`` is "extra_cpu_s" or "again_s"."""
    peers = measured(model, WHOLE)
    for row in measured(model, ("memfit",)):
        fitting = [peer for peer in peers if peer["peak_bytes"] <= row["budget_bytes"]]
        if fitting:
            best = min(fitting, key=lambda peer: peer[seconds])
            yield Duel(row["budget_bytes"], f"{best['peer']}: {best['name']}", row[seconds], best[seconds])


def against() -> list[list[str]]:
    """A row a model: extra time at equal memory, by the clock and by counted operators."""
    rows = []
    for model in models():
        cells = [model]
        for seconds in ("extra_cpu_s", "again_s"):
            ratios = [duel.ratio for duel in duels(model, seconds)]
            cells += [str(len(ratios))] if seconds == "extra_cpu_s" else []
            cells += [f"{statistics.median(ratios):.2f}", f"{max(ratios):.2f}"]
        memfit = measured(model, ("memfit", "memfit, accumulated"))
        ratios = [row["predicted_bytes"] / row["peak_bytes"] for row in memfit]
        cells += [str(sum(row["peak_bytes"] > row["budget_bytes"] for row in memfit))]
        cells += [str(sum(row["gradients_equal"] is False for row in memfit))]
        cells += [f"{min(ratios):.4f} to {max(ratios):.4f}", f"`{of(model)[0]['commit']}`"]
        rows.append(cells)
    return rows


def reach() -> list[list[str]]:
    """A row a model: the least memory of the batch, and the largest batch in a memory."""
    rows = []
    for model in models():
        whole = measured(model, WHOLE)
        own = measured(model, ("memfit",))
        largest = [row for row in of(model) if row["peer"] == "largest"]
        others = [row for row in largest if row["name"] != "memfit"]
        cells = [model, format_bytes(measured(model, ("plain",))[0]["peak_bytes"])]
        cells += [format_bytes(min(row["peak_bytes"] for row in found)) for found in (whole, own)]
        if others:
            best = max(others, key=lambda row: row["rows"])
            own_rows = next(row["rows"] for row in largest if row["name"] == "memfit")
            cells += [format_bytes(best["budget_bytes"]), f"{best['rows']} ({best['name']})", str(own_rows)]
        else:
            cells += ["-", "-", "-"]
        rows.append(cells)
    return rows


def every_budget() -> list[list[str]]:
    """A row a budget of each model."""
    rows = []
    for model in models():
        plain_s = measured(model, ("plain",))[0]["cpu_s"]
        for row in sorted(measured(model, ("memfit",)), key=lambda row: int(row["budget_bytes"])):
            duel = next(
                (d for d in duels(model, "extra_cpu_s") if d.budget_bytes == row["budget_bytes"]), None
            )
            peer = ["none fits", "-"] if duel is None else [duel.peer, f"{duel.peer_s / plain_s:+.1%}"]
            budget = format_bytes(row["budget_bytes"])
            rows.append([model, budget, *peer, f"{row['extra_cpu_s'] / plain_s:+.1%}"])
    return rows
