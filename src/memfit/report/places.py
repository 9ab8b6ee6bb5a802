"""Where an op is, as a path of modules."""

from __future__ import annotations

from itertools import accumulate

from memfit.core.graph import OpKey


def modules_of(key: OpKey) -> tuple[str, ...]:
    """The modules around an op, outermost first, each by its whole path: "blocks", "blocks.0" and so on.

    Outside of every module it is in the loss. A module's later calls are "blocks.0#1" and so on.
    """
    path = key.frame or "loss"
    return tuple(accumulate(path.split("."), lambda outer, name: f"{outer}.{name}"))
