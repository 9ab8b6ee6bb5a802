"""memfit fits a PyTorch training step into a stated amount of memory.

This module is only the door. It imports torch on the first use of a name that needs it, so
that ``import memfit`` and ``memfit --help`` answer at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from memfit.errors import (
    InexactAccumulation,
    InfeasibleBudget,
    MemfitError,
    UnsupportedModel,
    VerificationFailed,
)

if TYPE_CHECKING:
    from memfit.api import (
        Audit,
        Plan,
        Profile,
        Step,
        Timeline,
        Verdict,
        Workload,
        apply_gradient_checkpointing,
        audit,
        find_plan,
        fit,
        frontier,
        profile,
        simulate,
        windows,
    )

__version__ = "0.1.0"

__all__ = [
    "Audit",
    "InexactAccumulation",
    "InfeasibleBudget",
    "MemfitError",
    "Plan",
    "Profile",
    "Step",
    "Timeline",
    "UnsupportedModel",
    "Verdict",
    "VerificationFailed",
    "Workload",
    "apply_gradient_checkpointing",
    "audit",
    "find_plan",
    "fit",
    "frontier",
    "profile",
    "simulate",
    "windows",
]


if not TYPE_CHECKING:  # a type checker sees the imports above, so that a misspelt name stays an error

    def __getattr__(name: str) -> object:
        """Returns a public name of ``memfit.api``, which imports torch."""
        if name not in __all__:
            raise AttributeError(f"module 'memfit' has no attribute {name!r}")
        return getattr(import_module("memfit.api"), name)


def __dir__() -> list[str]:
    """Returns the public names, for completion."""
    return sorted([*__all__, "__version__"])
