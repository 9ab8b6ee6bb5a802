"""What torch.compile hides of a step: which modules, and how much of what is kept no plan can change."""

from __future__ import annotations

from typing import NamedTuple

from memfit.core.graph import COMPILED, LogKind, StepGraph
from memfit.core.timeline import Run
from memfit.units import format_bytes

_SHOWN = 4  # modules that are named

KNOB = (
    "the compiler's own knob, torch._functorch.config.activation_memory_budget, may lower that: it caps what "
    "a compiled graph saves, not the peak, which a smaller budget can raise (pytorch#197838), and gradients "
    "were silently wrong with dropout (pytorch#190758)"
)


class Hidden(NamedTuple):
    """Compiled modules, the bytes that they save of their own, and all bytes kept when the forward ends."""

    modules: tuple[str, ...] = ()
    hidden_bytes: int = 0
    kept_bytes: int = 0


NOTHING_HIDDEN = Hidden()


def hidden(graph: StepGraph, simulated: Run) -> Hidden:
    """What is hidden in one micro-batch, and what is kept at the end of its forward under a plan."""
    ops = [op for op in graph.ops[: graph.forward_ops] if op.key.op.startswith(COMPILED)]
    if not ops:
        return NOTHING_HIDDEN
    made = {storage for op in ops for storage in op.allocates}
    last = graph.log.index((LogKind.OP, graph.forward_ops - 1))
    freed = {item for kind, item in graph.log[:last] if kind == LogKind.FREE}
    names = dict.fromkeys(op.key.op.removeprefix(COMPILED) for op in ops)
    forward = [m for m in simulated.moments if m.op < graph.forward_ops and not m.is_replay]
    return Hidden(
        tuple(names),
        sum(graph.storages[index].size_bytes for index in made - freed),
        forward[-1].activation_bytes,
    )


def told(found: Hidden) -> str:
    """The same in words."""
    names, more = ", ".join(found.modules[:_SHOWN]), len(found.modules) - _SHOWN
    return (
        f"{names}{f' and {more} more' if more > 0 else ''}: {format_bytes(found.hidden_bytes)} of the "
        f"{format_bytes(found.kept_bytes)} that a forward keeps, which no plan changes"
    )
