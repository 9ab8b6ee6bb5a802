"""The errors memfit raises by design; each carries its numbers as attributes.

    MemfitError
    ├── InfeasibleBudget      no plan fits the stated memory
    ├── InexactAccumulation   the loss or the batch cannot be split exactly
    ├── UnsupportedModel      the model cannot be recorded or run
    └── VerificationFailed    a run broke a promise that planning again could not mend

Plain misuse (an unparsable size, a wrong type) raises ``ValueError`` or ``TypeError``.
"""

from __future__ import annotations


class MemfitError(Exception):
    """Base class: ``except memfit.MemfitError`` catches everything that may happen by design."""


class InfeasibleBudget(MemfitError):
    """No plan fits the stated memory.

    Attributes:
        budget_bytes: The memory that was asked for.
        needed_bytes: The smallest memory that works; planning with it succeeds.
        owner: What holds the peak at that memory.
    """

    def __init__(self, message: str, *, budget_bytes: int, needed_bytes: int, owner: str) -> None:
        super().__init__(message)
        self.budget_bytes = budget_bytes
        self.needed_bytes = needed_bytes
        self.owner = owner


class InexactAccumulation(MemfitError):
    """The batch or the loss cannot be split without changing the gradient.

    Attributes:
        owner: The leaf of the batch, the loss or the layer that forbids it.
    """

    def __init__(self, message: str, *, owner: str) -> None:
        super().__init__(message)
        self.owner = owner


class UnsupportedModel(MemfitError):
    """The model cannot be recorded or run by memfit.

    Attributes:
        owner: The module, parameter or function that is not supported.
    """

    def __init__(self, message: str, *, owner: str) -> None:
        super().__init__(message)
        self.owner = owner


class VerificationFailed(MemfitError):
    """A run broke the promise of its plan.

    Attributes:
        predicted_bytes: The promised peak.
        measured_bytes: The peak the allocator saw.
        budget_bytes: The memory that was asked for.
        needed_bytes: The smallest memory that works by what the run has shown; None if it is not known.
    """

    def __init__(
        self,
        message: str,
        *,
        predicted_bytes: int,
        measured_bytes: int,
        budget_bytes: int,
        needed_bytes: int | None = None,
    ) -> None:
        super().__init__(message)
        self.needed_bytes = needed_bytes
        self.predicted_bytes = predicted_bytes
        self.measured_bytes = measured_bytes
        self.budget_bytes = budget_bytes
