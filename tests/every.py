"""Every model there is to judge: families of ``transformers`` from tiny configurations, and hard ones.

A family is taken from ``families.py`` where it is there, with numbers chosen by hand; else its first head
that builds from a generic small configuration, as in ``heads.py``, with dropout as it is by default.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_mappings import CONFIG_MAPPING_NAMES

from families import FAMILIES, SIDE, own_loss, sounds
from hard import HARD
from heads import ROWS, TASKS, Task, batch_for, small_config, small_model
from judged import Specimen
from models import CASES, ZOO

_FAMILY_ROWS = 4
Batch = dict[str, Tensor]


def _seen() -> Batch:
    """Pictures of one class each, of the size that the model's configuration says."""
    return {"labels": torch.arange(ROWS) % 3}


def _foreseen() -> Batch:
    """Series of seven channels and what follows."""
    return {"past_values": torch.randn(ROWS, 32, 7), "future_values": torch.randn(ROWS, 24, 7)}


def _mapping(name: str) -> dict[str, Any]:
    found: dict[str, Any] = getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES")
    return found


# Further heads, that heads.py has no labels of unlike numbers for.
OTHER_TASKS = (
    Task("image classification", _mapping("IMAGE_CLASSIFICATION"), _seen),
    Task("audio classification", _mapping("AUDIO_CLASSIFICATION"), lambda: sounds(ROWS)),
    Task("time series", _mapping("TIME_SERIES_PREDICTION"), _foreseen),
)
# Deep networks first, so that each family is judged by a head with a loss over tokens where it has one.
_ORDER = ("causal", "masked", "seq2seq", "token classification", "sequence classification")
EVERY_TASK = (*(TASKS[name] for name in _ORDER), *OTHER_TASKS)


def _head(task: Task, model_type: str, layers: int, *, plainest: bool = False) -> nn.Module:
    """A head of some layers; of pictures of few pixels; the plainest has one layer and no cache."""
    config = small_config(model_type, 1 if plainest else layers, drops=True)
    if plainest:
        config.use_cache = False
    for part in (config, getattr(config, "vision_config", None), getattr(config, "backbone_config", None)):
        if part is not None and isinstance(getattr(part, "image_size", None), int):
            part.image_size = SIDE
        for name in ("depths", "layer_depths"):
            if isinstance(value := getattr(part, name, None), list):
                setattr(part, name, [1] * len(value))
    return small_model(task, model_type, config)


def _batch(task: Task, model: nn.Module) -> Batch:
    """A batch of the task; pictures of as many pixels and channels as the model wants."""
    batch = batch_for(task, model)
    if task.batch is _seen:
        config: Any = model.config
        channels = getattr(config, "num_channels", 3)
        batch["pixel_values"] = torch.randn(ROWS, channels, SIDE, SIDE)
    elif task.name == "audio classification":
        batch["labels"] = batch["labels"] % 3
    return batch


def heads(layers: int) -> Iterator[tuple[str, list[Specimen]]]:
    """Each model type not in ``families.py``, with its heads in the order in which they are tried."""
    own = {family.config for family in FAMILIES.values()}
    types = dict.fromkeys(name for task in EVERY_TASK for name in task.models)
    for model_type in types:
        if _config_name(model_type) not in own:
            tried = [task for task in EVERY_TASK if model_type in task.models]
            yield (
                model_type,
                [_of_head(task, model_type, layers, plainest=way) for way in (False, True) for task in tried],
            )


def _config_name(model_type: str) -> str:
    return str(CONFIG_MAPPING_NAMES.get(model_type, ""))


def _of_head(task: Task, model_type: str, layers: int, *, plainest: bool) -> Specimen:
    build = partial(_head, task, model_type, layers, plainest=plainest)
    return Specimen(model_type, task.name, build, partial(_batch, task), own_loss)


def families() -> Iterator[tuple[str, list[Specimen]]]:
    """The families whose numbers are chosen by hand."""
    for family in FAMILIES.values():
        yield family.name, [
            Specimen(family.name, family.kind, family.build, _ignoring(partial(family.batch, _FAMILY_ROWS)),
                     own_loss)
        ]  # fmt: skip


def _ignoring(make: Callable[[], Any]) -> Callable[[nn.Module], Any]:
    """A batch that does not depend on the model."""
    return lambda _: make()


def hard_ones() -> Iterator[tuple[str, list[Specimen]]]:
    """Models with hard control flow, one thing each."""
    for hard in HARD.values():
        yield (
            hard.name,
            [Specimen(hard.name, "hard", hard.build, _ignoring(hard.batch), hard.loss, hard.raises)],
        )


def others() -> Iterator[tuple[str, list[Specimen]]]:
    """The cases of the suite, and larger networks."""
    for case in CASES.values():
        yield case.name, [Specimen(case.name, "case", case.model, _ignoring(case.batch), case.loss, seed=5)]
    for zoo in ZOO.values():
        batch = _ignoring(partial(zoo.batch, zoo.rows, 1))
        yield f"{zoo.name} (network)", [Specimen(zoo.name, "network", partial(zoo.build, 1), batch, zoo.loss)]


def every_model(layers: int = 2) -> Iterator[tuple[str, list[Specimen]]]:
    """All of them: the hard ones first; heads from generic configurations have so many layers."""
    yield from hard_ones()
    yield from families()
    yield from heads(layers)
    yield from others()
