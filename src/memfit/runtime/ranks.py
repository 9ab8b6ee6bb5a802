"""What memfit knows of the other processes that train the same model: small numbers and texts of all of them.

Note [Together]
 1. Each rank runs the same code, so all come to the same meetings in the same order. What goes wrong on one
    rank between two meetings is told at the next, and raised on all: nobody waits for one that has given up.
 2. The error of the lowest rank that failed is raised. There it is the error itself, with a note of the rank;
    elsewhere one of the same kind that begins with "rank 2:". Running out of memory stays that, so that a
    rescue begins on all ranks.
 3. What depends on a clock or a solver (profile, plan) is made on one rank, and its text is shared.
 4. A meeting is one all-reduce of a small table, in which each rank fills its own row and no other: sums come
    out the same on all ranks, to the bit.
 5. One process alone meets nobody: nothing of this runs, and torch.distributed is not imported.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from memfit import errors
from memfit.runtime.rescue import is_out_of_memory

Row = Sequence[float | Tensor]

_KINDS: Final[dict[str, type[Exception]]] = {
    kind.__name__: kind
    for kind in (
        *(errors.InfeasibleBudget, errors.InexactAccumulation, errors.UnsupportedModel),
        *(errors.VerificationFailed, errors.MemfitError, ValueError, TypeError, OSError),
    )
}
_OUT_OF_MEMORY: Final = "out of memory"
_FAILED: Final = 1.0


@dataclass(frozen=True, slots=True)
class Ranks:
    """The processes of a group; by default one process alone. See Note [Together].

    Attributes:
        group: A ``torch.distributed`` process group; None with a ``size`` above 1 is the default group.
        place: Where tensors must be for the group's backend.
    """

    size: int = 1
    rank: int = 0
    group: Any = None
    place: torch.device | str = "cpu"

    @staticmethod
    def of(group: Any, device: torch.device) -> Ranks:
        """The processes of a group whose models are on such a device."""
        import torch.distributed as dist

        place = "cpu" if dist.get_backend(group) == "gloo" else device
        return Ranks(dist.get_world_size(group), dist.get_rank(group), group, place)

    @property
    def message_bytes(self) -> int:
        """Bytes that tables of up to ten numbers a rank take on a CPU."""
        return 0 if self.size == 1 else 2 * 8 * 10 * (self.size + 1)

    def table(self, row: Row, error: Exception | None = None) -> list[list[float]]:
        """The rows of all ranks, by rank, each as long as this one. A meeting.

        Args:
            error: What has gone wrong on this rank since the last meeting.

        Raises:
            Exception: What went wrong on the lowest rank where something did.
        """
        if self.size == 1:
            if error is not None:
                raise error
            return [[float(number) for number in row]]
        import torch.distributed as dist

        table = torch.zeros(self.size, 1 + len(row), dtype=torch.float64, device=self.place)
        if error is not None:
            table[self.rank, 0] = _FAILED
        else:
            for column, number in enumerate(row, 1):
                table[self.rank, column] = number
        dist.all_reduce(table, group=self.group)
        rows: list[list[float]] = table.tolist()
        failed = [rank for rank, (status, *_) in enumerate(rows) if status]
        if failed:
            self._raise(failed[0], error)
        return [numbers for _, *numbers in rows]

    @contextmanager
    def together(self) -> Iterator[None]:
        """What goes wrong in the body on one rank goes wrong on all. The end of the body is a meeting.

        Raises:
            Exception: What went wrong on the lowest rank where something did.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        try:
            self.table((), failure)
        finally:
            del failure  # it holds this frame, and this frame would hold it

    def total(self, number: float) -> float:
        """The sum over the ranks. A meeting."""
        return sum(one for (one,) in self.table([number]))

    def most(self, number: float) -> float:
        """The largest of all ranks. A meeting."""
        return max(one for (one,) in self.table([number]))

    def least(self, number: float) -> float:
        """The smallest of all ranks. A meeting."""
        return min(one for (one,) in self.table([number]))

    def with_most(self, number: float) -> int:
        """The lowest rank that has the largest number. A meeting."""
        numbers = [one for (one,) in self.table([number])]
        return numbers.index(max(numbers))

    def any(self, condition: bool) -> bool:
        """Whether something holds on at least one rank. A meeting."""
        return bool(self.most(condition))

    def share(self, text: str, root: int) -> str:
        """The text that rank ``root`` has; what others give is not looked at."""
        if self.size == 1:
            return text
        import torch.distributed as dist

        told = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) if text else torch.empty(0)
        length = torch.tensor([len(told) if self.rank == root else 0], device=self.place)
        dist.broadcast(length, group=self.group, group_src=root)
        content = torch.empty(int(length), dtype=torch.uint8, device=self.place)
        if self.rank == root:
            content.copy_(told)
        if len(content):
            dist.broadcast(content, group=self.group, group_src=root)
        return bytes(content.tolist()).decode()

    def made_by(self, root: int, make: Callable[[], str]) -> str:
        """A text that one rank makes, on all ranks.

        Raises:
            Exception: What went wrong while it was made.
        """
        if self.size == 1:
            return make()
        text = ""
        with self.together():
            if self.rank == root:
                text = make()
        return self.share(text, root)

    def _raise(self, failed: int, own: Exception | None) -> None:
        """Raises the error of a rank on this one. See Note [Together] 2."""
        told = _told(own) if self.rank == failed and own is not None else ""
        found = json.loads(self.share(told, failed))
        if self.rank == failed and own is not None:
            own.add_note(f"This was on rank {failed} of {self.size}; the others stopped with it.")
            raise own
        error = _error(found, failed)
        error.is_told = True  # type: ignore[attr-defined]  # by the rank that has it
        raise error from own


def _told(error: Exception) -> str:
    """An error as a text: its kind, what it says, and its numbers."""
    kind = _OUT_OF_MEMORY if is_out_of_memory(error) else type(error).__name__
    known = isinstance(error, errors.MemfitError)
    numbers = {name: value for name, value in vars(error).items() if known and not name.startswith("_")}
    says = str(error) if known or isinstance(error, (ValueError, TypeError)) else f"{kind}: {error}"
    return json.dumps(
        {"kind": kind, "says": str(error) if kind == _OUT_OF_MEMORY else says, "numbers": numbers}
    )


def _error(told: dict[str, Any], rank: int) -> Exception:
    """The error that another rank told of; a RuntimeError where its kind is not known here."""
    says = f"rank {rank}: {told['says']}"
    if told["kind"] == _OUT_OF_MEMORY:
        return torch.OutOfMemoryError(says)
    return _KINDS.get(told["kind"], RuntimeError)(says, **told["numbers"])
