"""A plan in the settings of other tools, as far as they can say it, and what they cannot.

Note [Export]
 1. The effective batch is the user's. A tool has parts of one size only, so where the plan's are not equal
    the largest smaller size that divides the rows is taken: it needs no more memory than the plan's.
 2. These tools know recomputation as all or nothing, for each repeated block of the model. A plan that
    recomputes anything becomes "all": nothing less is sure to fit. What that is predicted to take is said
    where it was worked out (:func:`memfit.core.strategies.strategies`).
 3. Keys are those of transformers' TrainingArguments and of axolotl's YAML. transformers 5 has begun to call
    ``gradient_checkpointing`` ``activation_checkpointing`` and takes the former until 6.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from memfit.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from memfit.core.plan import Plan
    from memfit.core.strategies import Strategy

_ROWS_KEY = {"transformers": "per_device_train_batch_size", "axolotl": "micro_batch_size"}


@dataclass(frozen=True, slots=True)
class Export:
    """Settings of another tool; ``str`` of it is ready to paste.

    Attributes:
        tool: ``"transformers"`` or ``"axolotl"``.
        keys: Its settings: arguments of ``TrainingArguments``, or the keys of a YAML file.
        not_expressed: What the plan says and the tool cannot, one sentence each.
    """

    tool: str
    keys: dict[str, Any]
    not_expressed: tuple[str, ...]

    def __str__(self) -> str:
        """Comments on what is lost, then the settings: Python arguments or YAML."""
        lost = [f"# not expressed: {sentence}" for sentence in self.not_expressed]
        keys = _as_yaml(self.keys) if self.tool == "axolotl" else _as_arguments(self.keys)
        return "\n".join([*lost, *keys])


def export(plan: Plan, tool: str, compared: Iterable[Strategy] = ()) -> Export:
    """The settings of ``tool`` that come nearest to a plan. See Note [Export].

    Args:
        tool: ``"transformers"`` or ``"axolotl"``.
        compared: What checkpointing by hand is predicted to take, from the plan's own profile.

    Raises:
        ValueError: The tool is none of these.
    """
    if tool not in _ROWS_KEY:
        raise ValueError(f"a plan cannot be exported to {tool!r}: memfit knows {' and '.join(_ROWS_KEY)}")
    size = equal_part(plan)
    keys: dict[str, Any] = {
        _ROWS_KEY[tool]: size,
        "gradient_accumulation_steps": plan.rows // size,
    }
    if plan.recomputes:
        keys["gradient_checkpointing"] = True
        keys["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    lost = [
        *_lost_passes(plan),
        *_lost_parts(plan, size),
        *_lost_choice(plan, compared),
        *_lost_denominator(plan.rows // size),
        f"the budget of {format_bytes(plan.budget_bytes)}: it holds for the optimizer and the lengths that "
        "were planned for, and the tool does not check it",
    ]
    return Export(tool, keys, tuple(lost))


def equal_part(plan: Plan) -> int:
    """The most rows of a part that all parts can have, at most the plan's micro-batch."""
    small = [size for size in range(1, math.isqrt(plan.rows) + 1) if plan.rows % size == 0]
    return max(size for pair in small for size in (pair, plan.rows // pair) if size <= plan.micro_batch_size)


def _lost_passes(plan: Plan) -> Iterator[str]:
    """Two passes are a recipe of their own."""
    if plan.is_two_pass:
        yield (
            "two passes: the loss couples the rows, and the tool would take it on each micro-batch alone, "
            "which is ANOTHER LOSS; train with memfit's step, or with the whole batch at once"
        )


def _lost_parts(plan: Plan, size: int) -> Iterator[str]:
    """Parts of several sizes; devices."""
    if plan.rows % plan.micro_batch_size:
        yield (
            f"{plan.gradient_accumulation_steps} parts of at most {plan.micro_batch_size} rows: the tool has "
            f"equal parts only, and {plan.rows // size} x {size} keeps the batch of {plan.rows} rows"
        )
    yield "on N devices the tool's batch is N times as large: divide gradient_accumulation_steps by N"


def _lost_choice(plan: Plan, compared: Iterable[Strategy]) -> Iterator[str]:
    """Which tensors are recomputed, and what "all" takes instead."""
    if not plan.recomputes:
        return
    share = plan.recompute_s / max(plan.forward_s, 1e-12)
    more = "; some are computed more than once, in levels" if plan.levels else ""
    yield (
        f"which {plan.recomputes} tensors are recomputed, {share:.1%} of a forward{more}: "
        "gradient_checkpointing recomputes every block, at most about one forward"
    )
    every = [found for found in compared if found.family == "every block"]
    if not every:
        yield (
            "whether every block under checkpointing fits the budget: the plan does not know; `memfit "
            "plan --export` and `memfit frontier` work it out"
        )
        return
    best = min(every, key=lambda found: found.predicted_peak_bytes)
    peak, slower = best.predicted_peak_bytes, best.predicted_step_s / plan.predicted_step_s - 1
    fits = "fits" if peak <= plan.budget_bytes else "DOES NOT FIT"
    yield (
        f"checkpointing every block is predicted to peak at {format_bytes(peak)}, which {fits}, and to take "
        f"{format_seconds(best.predicted_step_s)} a step in micro-batches of {best.micro_batch_size} rows, "
        f"{abs(slower):.1%} {'more' if slower >= 0 else 'less'} than the plan (its Python is not counted)"
    )


def _lost_denominator(parts: int) -> Iterator[str]:
    """The weights of parts."""
    if parts > 1:
        yield (
            "the weight of each part: the tool divides by the labels of the whole batch only for models that "
            "take num_items_in_batch, and by the number of parts for others, which is another gradient where "
            "parts have unequal numbers of labels"
        )


def _as_arguments(keys: dict[str, Any]) -> Iterator[str]:
    """Lines of keyword arguments."""
    return (f"{name}={value!r}," for name, value in keys.items())


def _as_yaml(keys: dict[str, Any], indent: str = "") -> Iterator[str]:
    """Lines of YAML, for numbers, booleans and mappings of them."""
    for name, value in keys.items():
        if isinstance(value, dict):
            yield f"{indent}{name}:"
            yield from _as_yaml(value, indent + "  ")
        else:
            yield f"{indent}{name}: {str(value).lower() if isinstance(value, bool) else value}"
