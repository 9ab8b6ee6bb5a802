"""The models that ``peers.py`` compares on: deep, narrow, and with activations that dwarf their weights.

Dropout is as each configuration has it by default. Layer drop is off: it chooses by chance what runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from models import UNet

WORDS, LABELS, LAYERS = 512, 10, 12
Batch = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Job:
    """A model and its batches.

    Attributes:
        lists: The lists of blocks, by path, in the order in which they run.
        count: What the loss is a mean over; None where micro-batches would change the gradient.
        is_chain: Whether each block takes its input from the one before alone.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    rows: int
    lists: tuple[str, ...]
    count: str | None = "rows"
    is_chain: bool = True


def own_loss(model: Any, batch: Batch) -> Tensor:
    """The loss that the model computes itself."""
    loss: Tensor = model(**batch).loss
    return loss


class Restored(UNet):
    """The U-Net of the tests as an auto-encoder."""

    def forward(self, pixel_values: Tensor) -> Any:
        """[rows, 3, height, width]; the loss is the mean square of what comes out."""
        return transformers.utils.ModelOutput(loss=super().forward(pixel_values).square().mean())


def text(tokens: int) -> Callable[[int], Batch]:
    """Tokens to predict: [rows, tokens]."""

    def batch(rows: int) -> Batch:
        ids = torch.randint(3, WORDS, (rows, tokens))
        return {"input_ids": ids, "labels": ids}

    return batch


def pictures(side: int, *, labelled: bool = True) -> Callable[[int], Batch]:
    """Pictures, to be classified: [rows, 3, side, side]."""

    def batch(rows: int) -> Batch:
        labels = {"labels": torch.randint(0, LABELS, (rows,))} if labelled else {}
        return {"pixel_values": torch.randn(rows, 3, side, side), **labels}

    return batch


def speech(frames: int, tokens: int) -> Callable[[int], Batch]:
    """Spectrograms to transcribe: [rows, 80, frames]."""

    def batch(rows: int) -> Batch:
        labels = torch.randint(3, WORDS, (rows, tokens))
        return {"input_features": torch.randn(rows, 80, frames), "labels": labels}

    return batch


def built(config: str, model: str, **numbers: Any) -> Callable[[], nn.Module]:
    """A model of ``transformers`` in training mode, with random weights."""

    def build() -> nn.Module:
        made: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**numbers))
        return made.train()

    return build


_WORDS = {"vocab_size": WORDS, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "use_cache": False}
_WIDE = {"hidden_size": 256, "num_hidden_layers": LAYERS, "num_attention_heads": 8}
_GROUPED = {**_WORDS, **_WIDE, "intermediate_size": 704, "num_key_value_heads": 8}
_SWIN = {"image_size": 64, "patch_size": 2, "embed_dim": 48, "depths": [2, 2, 6, 2], "window_size": 4}
_RESNET = {"embedding_size": 32, "hidden_sizes": [64, 128, 256, 512], "num_labels": LABELS}
_WHISPER = {
    **_WORDS,
    "d_model": 192,
    "encoder_layers": 6,
    "decoder_layers": 6,
    "encoder_ffn_dim": 768,
    "decoder_ffn_dim": 768,
    "encoder_attention_heads": 8,
    "decoder_attention_heads": 8,
    "max_source_positions": 256,
    "max_target_positions": 96,
    "decoder_start_token_id": 1,
    "dropout": 0.1,
}
_STAGES = tuple(range(4))
JOBS = {
    job.name: job
    for job in (
        Job(
            "gpt2",
            built("GPT2Config", "GPT2LMHeadModel", n_layer=LAYERS, n_embd=256, n_head=8, **_WORDS),
            text(160),
            4,
            ("transformer.h",),
            "shifted_labels",
        ),
        Job(
            "llama",
            built("LlamaConfig", "LlamaForCausalLM", **_GROUPED),
            text(192),
            4,
            ("model.layers",),
            "shifted_labels",
        ),
        Job(
            "bert",
            built("BertConfig", "BertForMaskedLM", intermediate_size=1024, **_WORDS, **_WIDE),
            text(192),
            4,
            ("bert.encoder.layer",),
            "labels",
        ),
        Job(
            "vit",
            built(
                "ViTConfig",
                "ViTForImageClassification",
                image_size=96,
                patch_size=8,
                intermediate_size=768,
                num_labels=LABELS,
                **_WIDE | {"hidden_size": 192},
            ),
            pictures(96),
            8,
            ("vit.layers",),
        ),
        Job(
            "resnet50",
            built("ResNetConfig", "ResNetForImageClassification", **_RESNET),
            pictures(96),
            48,
            tuple(f"resnet.encoder.stages.{stage}.layers" for stage in _STAGES),
            None,
        ),
        Job(
            "swin",
            built("SwinConfig", "SwinForImageClassification", num_labels=LABELS, **_SWIN),
            pictures(64),
            12,
            tuple(f"swin.encoder.layers.{stage}.blocks" for stage in _STAGES),
        ),
        Job(
            "mamba",
            built(
                "MambaConfig",
                "MambaForCausalLM",
                hidden_size=128,
                num_hidden_layers=LAYERS,
                state_size=8,
                **_WORDS,
            ),
            text(48),
            4,
            ("backbone.layers",),
            "shifted_labels",
        ),
        Job(
            "mixtral",
            built(
                "MixtralConfig",
                "MixtralForCausalLM",
                num_local_experts=4,
                **_GROUPED | {"intermediate_size": 256},
            ),
            text(192),
            4,
            ("model.layers",),
            "shifted_labels",
        ),
        Job(
            "whisper",
            built("WhisperConfig", "WhisperForConditionalGeneration", **_WHISPER),
            speech(512, 96),
            6,
            ("model.encoder.layers", "model.decoder.layers"),
            "labels",
        ),
        Job(
            "unet",
            lambda: Restored().train(),
            pictures(64, labelled=False),
            12,
            ("down", "up"),
            is_chain=False,
        ),
    )
}
