"""What live bytes are for: the categories' names, letters and colours, the same in every picture.

Colours are those of PyTorch's memory timeline (torch/profiler/_memory_profiler.py); there is none for
recomputed activations, so they are a light red. On a dark page they are lighter. What is behind the text of
a terminal nobody knows, so there they are in the middle, to be seen on both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memfit.core.timeline import Event

# The order in which they are stacked: what lives throughout first.
CATEGORIES = (
    "parameters",
    "gradients",
    "optimizer state",
    "batch",
    "activations kept",
    "activations recomputed",
    "temporaries",
)
LETTERS = "PGOBKRT"
LIGHT = ("darkgreen", "mediumblue", "goldenrod", "black", "red", "lightsalmon", "mediumpurple")
DARK = ("#3fa35b", "#5c82ff", "goldenrod", "#c8ccd4", "#ff4d4d", "#ffc2a8", "#b39ae6")
EITHER = ("#2e9150", "#4a70f0", "#c9961a", "#808691", "#e83a3a", "#f0a080", "#9370db")


def sizes_of(event: Event) -> tuple[int, ...]:
    """The bytes of an event in the order of ``CATEGORIES``."""
    return (
        event.parameters_bytes,
        event.gradients_bytes,
        event.optimizer_bytes,
        event.batch_bytes,
        event.activations_bytes,
        event.replayed_bytes,
        event.temporaries_bytes,
    )
