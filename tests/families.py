"""Families of ``transformers`` in small, made from configurations alone: random weights, dropout on, offline.

A family is the name of its configuration and model classes, a few numbers, and the kind of its batch.
Layer drop and SpecAugment are off: they choose what runs by chance, so no plan can say what the next step
will hold.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import memfit
from memfit.core.batching import parts_for
from memfit.errors import InfeasibleBudget
from memfit.runtime import count
from memfit.runtime.accumulate import Accumulation
from memfit.runtime.batch import split
from memfit.runtime.job import optimizer_state
from memfit.runtime.meter import PeakMeter, resident_bytes
from models import accumulated, differences, outcome_of

VOCABULARY, TOKENS, SIDE, SAMPLES, LABELS = 1000, 64, 64, 8000, 10

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Family:
    """One family. ``count`` is None where micro-batches would change the loss."""

    name: str
    kind: str
    config: str
    model: str
    batch: Callable[[int], Batch]
    count: str | None
    numbers: dict[str, Any] = field(default_factory=dict)

    def build(self) -> nn.Module:
        """The model in training mode."""
        config = getattr(transformers, self.config)(**self.numbers)
        model: nn.Module = getattr(transformers, self.model)(config)
        return model.train()


def own_loss(model: Any, batch: Batch) -> Tensor:
    """The loss a model computes itself; without labels, that of pairs against each other."""
    without = {} if "labels" in batch else {"return_loss": True}
    loss: Tensor = model(**batch, **without).loss
    return loss


# ---- batches ---------------------------------------------------------------------------------------------


def _ids(rows: int) -> Tensor:
    return torch.randint(5, VOCABULARY, (rows, TOKENS))


def text(rows: int) -> Batch:
    """Tokens to predict, a third of them ignored."""
    ids = _ids(rows)
    labels = ids.clone()
    labels[:, ::3] = -100
    return {"input_ids": ids, "labels": labels}


def padded_text(rows: int) -> Batch:
    """The same with a mask: rows of unlike lengths, as a data collator makes them."""
    batch = text(rows)
    lengths = torch.randint(TOKENS // 2, TOKENS + 1, (rows, 1))
    mask = torch.arange(TOKENS) < lengths
    batch["labels"][~mask] = -100
    return {**batch, "attention_mask": mask.long()}


def pairs(rows: int) -> Batch:
    """A text and its shorter translation."""
    labels = torch.randint(5, VOCABULARY, (rows, TOKENS // 2))
    labels[:, -4:] = -100
    return {"input_ids": _ids(rows), "labels": labels}


def pictures(rows: int) -> Batch:
    """Pictures to classify."""
    return {"pixel_values": torch.randn(rows, 3, SIDE, SIDE), "labels": torch.randint(0, LABELS, (rows,))}


def segmented(rows: int) -> Batch:
    """Pictures of which every pixel is classified."""
    labels = torch.randint(0, LABELS, (rows, SIDE, SIDE))
    return {"pixel_values": torch.randn(rows, 3, SIDE, SIDE), "labels": labels}


def sounds(rows: int) -> Batch:
    """Half a second of sound to classify."""
    return {"input_values": torch.randn(rows, SAMPLES), "labels": torch.randint(0, LABELS, (rows,))}


def speech(rows: int) -> Batch:
    """A spectrogram to transcribe."""
    return {"input_features": torch.randn(rows, 16, 2 * TOKENS), "labels": pairs(rows)["labels"]}


def spectrograms(rows: int) -> Batch:
    """A spectrogram to classify."""
    return {"input_values": torch.randn(rows, 256, 32), "labels": torch.randint(0, LABELS, (rows,))}


def captions(rows: int) -> Batch:
    """Pictures with their texts, to be told apart from each other."""
    return {"input_ids": _ids(rows), "pixel_values": torch.randn(rows, 3, SIDE, SIDE)}


# ---- the table -------------------------------------------------------------------------------------------

_LAYERED = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
_WORDS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_BERT = {**_LAYERED, **_WORDS, "max_position_embeddings": TOKENS}
_DROPPED = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
_GROUPED = {**_LAYERED, **_WORDS, "num_key_value_heads": 2, "attention_dropout": 0.1}
_PATCHED = {**_LAYERED, **_DROPPED, "image_size": SIDE, "patch_size": 8, "num_labels": LABELS}
_EXPERTS = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
_STAGES = {
    "hidden_sizes": [16, 32, 48, 64],
    "depths": [1, 1, 2, 1],
    "drop_path_rate": 0.1,
    "num_labels": LABELS,
}
_HEARD = {
    **_LAYERED,
    "vocab_size": 32,
    "conv_dim": [32, 32, 32],
    "conv_stride": [5, 4, 4],
    "conv_kernel": [10, 4, 4],
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "classifier_proj_size": 32,
    "layerdrop": 0.0,
    "apply_spec_augment": False,
    "num_labels": LABELS,
}


def _decoder(name: str, prefix: str, numbers: dict[str, Any], batch: Callable[[int], Batch] = text) -> Family:
    """A causal language model."""
    return Family(
        name, "decoder", f"{prefix}Config", f"{prefix}ForCausalLM", batch, "shifted_labels", numbers
    )


def _encoder(name: str, prefix: str, numbers: dict[str, Any], batch: Callable[[int], Batch] = text) -> Family:
    """A masked language model."""
    return Family(name, "encoder", f"{prefix}Config", f"{prefix}ForMaskedLM", batch, "labels", numbers)


def _vision(name: str, prefix: str, numbers: dict[str, Any], count: str | None = "rows") -> Family:
    """A classifier of pictures."""
    return Family(
        name, "vision", f"{prefix}Config", f"{prefix}ForImageClassification", pictures, count, numbers
    )


def _audio(name: str, prefix: str, numbers: dict[str, Any]) -> Family:
    """A classifier of sounds."""
    return Family(
        name, "audio", f"{prefix}Config", f"{prefix}ForSequenceClassification", sounds, "rows", numbers
    )


_DECODERS = (
    Family(
        "gpt2", "decoder", "GPT2Config", "GPT2LMHeadModel", padded_text, "shifted_labels",
        {**_WORDS, "n_layer": 2, "n_embd": 64, "n_head": 4, "n_positions": TOKENS},
    ),
    _decoder("llama", "Llama", _GROUPED),
    _decoder("mistral", "Mistral", {**_GROUPED, "sliding_window": 16}),
    _decoder("qwen2", "Qwen2", _GROUPED, padded_text),
    _decoder("qwen3", "Qwen3", {**_GROUPED, "head_dim": 16}),
    _decoder("gemma", "Gemma", {**_GROUPED, "head_dim": 16}),
    _decoder("gemma2", "Gemma2", {**_GROUPED, "head_dim": 16, "sliding_window": 16}),
    _decoder("phi", "Phi", {**_GROUPED, "resid_pdrop": 0.1, "embd_pdrop": 0.1}),
    _decoder("phi3", "Phi3", {**_GROUPED, "resid_pdrop": 0.1, "embd_pdrop": 0.1}),
    _decoder(
        "opt", "OPT",
        {**_BERT, "ffn_dim": 256, "word_embed_proj_dim": 64, "attention_dropout": 0.1}, padded_text,
    ),
    _decoder(
        "bloom", "Bloom", {**_WORDS, "hidden_size": 64, "n_layer": 2, "n_head": 4, "hidden_dropout": 0.1},
    ),
    _decoder("gpt_neox", "GPTNeoX", {**_BERT, "hidden_dropout": 0.1, "attention_dropout": 0.1}),
    _decoder(
        "falcon", "Falcon",
        {**_WORDS, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "hidden_dropout": 0.1},
    ),
    _decoder("stablelm", "StableLm", {**_GROUPED, "hidden_dropout": 0.1}),
    _decoder("granite", "Granite", _GROUPED),
    _decoder(
        "mamba", "Mamba",
        {**_WORDS, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8, "use_cache": False},
    ),
    _decoder("mixtral", "Mixtral", {**_GROUPED, "num_local_experts": 4}),
    _decoder("olmoe", "Olmoe", {**_GROUPED, **_EXPERTS}),
    _decoder("qwen2_moe", "Qwen2Moe", {**_GROUPED, **_EXPERTS, "shared_expert_intermediate_size": 128}),
)  # fmt: skip

_ENCODERS = (
    _encoder("bert", "Bert", _BERT, padded_text),
    _encoder("roberta", "Roberta", {**_BERT, "max_position_embeddings": TOKENS + 2}),
    _encoder(
        "distilbert", "DistilBert",
        {**_WORDS, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 256,
         "max_position_embeddings": TOKENS},
    ),
    _encoder("albert", "Albert", {**_BERT, **_DROPPED, "embedding_size": 32}),
    _encoder("electra", "Electra", {**_BERT, "embedding_size": 32}, padded_text),
    _encoder(
        "deberta_v2", "DebertaV2",
        {**_BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 16},
        padded_text,
    ),
    _encoder("mpnet", "MPNet", {**_BERT, "max_position_embeddings": TOKENS + 2}),
    _encoder("modernbert", "ModernBert", {
        **_BERT, "cls_token_id": 3, "sep_token_id": 4, "embedding_dropout": 0.1, "mlp_dropout": 0.1,
    }),
    _encoder("fnet", "FNet", {**_BERT, "tpu_short_seq_length": TOKENS}),
)  # fmt: skip

_PAIRED = (
    Family(
        "t5", "encoder-decoder", "T5Config", "T5ForConditionalGeneration", pairs, "labels",
        {**_WORDS, "d_model": 64, "d_kv": 16, "d_ff": 256, "num_layers": 2, "num_heads": 4,
         "decoder_start_token_id": 0},
    ),
    Family(
        "bart", "encoder-decoder", "BartConfig", "BartForConditionalGeneration", pairs, "labels",
        {**_WORDS, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 256,
         "decoder_ffn_dim": 256, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
         "max_position_embeddings": TOKENS, "decoder_start_token_id": 2, "forced_eos_token_id": 2},
    ),
    Family(
        "whisper", "encoder-decoder", "WhisperConfig", "WhisperForConditionalGeneration", speech, "labels",
        {**_WORDS, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 256,
         "decoder_ffn_dim": 256, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
         "num_mel_bins": 16, "max_source_positions": TOKENS, "max_target_positions": TOKENS,
         "decoder_start_token_id": 3, "dropout": 0.1},
    ),
)  # fmt: skip

_SEEING = (
    _vision("vit", "ViT", _PATCHED),
    _vision("deit", "DeiT", _PATCHED),
    _vision("dinov2", "Dinov2", {**_PATCHED, "drop_path_rate": 0.1}),
    _vision("beit", "Beit", {**_PATCHED, "drop_path_rate": 0.1}),
    _vision(
        "resnet", "ResNet",
        {"embedding_size": 32, "hidden_sizes": [32, 64], "depths": [2, 2], "num_labels": LABELS}, None,
    ),
    _vision(
        "regnet", "RegNet",
        {"embedding_size": 32, "hidden_sizes": [32, 64], "depths": [1, 2], "groups_width": 8,
         "num_labels": LABELS}, None,
    ),
    _vision("mobilenet_v2", "MobileNetV2", {"depth_multiplier": 0.25, "num_labels": LABELS}, None),
    _vision(
        "swin", "Swin",
        {**_DROPPED, "image_size": SIDE, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4],
         "window_size": 4, "drop_path_rate": 0.1, "num_labels": LABELS},
    ),
    _vision("convnext", "ConvNext", _STAGES),
    _vision("convnextv2", "ConvNextV2", _STAGES),
    Family(
        "segformer", "vision", "SegformerConfig", "SegformerForSemanticSegmentation", segmented, None,
        {**_DROPPED, "hidden_sizes": [16, 32, 40, 64], "depths": [1, 1, 1, 1], "num_labels": LABELS,
         "num_attention_heads": [1, 2, 5, 8], "decoder_hidden_size": 64},
    ),
)  # fmt: skip

_HEARING = (
    _audio("wav2vec2", "Wav2Vec2", _HEARD),
    _audio("hubert", "Hubert", _HEARD),
    _audio("wavlm", "WavLM", _HEARD),
    Family(
        "ast", "audio", "ASTConfig", "ASTForAudioClassification", spectrograms, "rows",
        {**_LAYERED, **_DROPPED, "max_length": 256, "num_mel_bins": 32, "num_labels": LABELS},
    ),
)  # fmt: skip

_SEEING_AND_READING = (
    Family(
        "clip", "multimodal", "CLIPConfig", "CLIPModel", captions, None,
        {"projection_dim": 64,
         "text_config": {**_BERT, "attention_dropout": 0.1},
         "vision_config": {**_LAYERED, "image_size": SIDE, "patch_size": 8, "attention_dropout": 0.1}},
    ),
    Family(
        "siglip", "multimodal", "SiglipConfig", "SiglipModel", captions, None,
        {"text_config": {**_BERT, "attention_dropout": 0.1},
         "vision_config": {**_LAYERED, "image_size": SIDE, "patch_size": 8, "attention_dropout": 0.1}},
    ),
)  # fmt: skip

FAMILIES = {
    family.name: family
    for family in (*_DECODERS, *_ENCODERS, *_PAIRED, *_SEEING, *_HEARING, *_SEEING_AND_READING)
}


# ---- the judge -------------------------------------------------------------------------------------------

_COUNTERS = {"rows": count.rows, "labels": count.labels, "shifted_labels": count.shifted_labels}


@dataclass(frozen=True)
class JudgedStep:
    """One whole step, ``optimizer.step()`` included, judged by the allocator and by the plain step."""

    predicted_bytes: int
    measured_bytes: int
    differences: list[str]

    @property
    def ratio(self) -> float:
        """Predicted over measured."""
        return self.predicted_bytes / self.measured_bytes


def fitted(
    family: Family, model: nn.Module, batch: Batch, budget: int, rows: int
) -> tuple[memfit.Step, torch.optim.Optimizer]:
    """The step at a budget with an AdamW of its own, or at the least memory that works if that is more."""
    for _ in range(3):
        optimizer = torch.optim.AdamW(model.parameters())
        try:
            step = memfit.fit(
                model,
                own_loss,
                batch,
                memory=budget,
                optimizer=optimizer,
                micro_batch_size=rows,
                count=family.count or "auto",
            )
            return step, optimizer
        except InfeasibleBudget as refused:
            budget = refused.needed_bytes
    raise AssertionError("the memory that a refusal named was refused again and again")


def stepped(
    model: nn.Module, profile: memfit.Profile, budget: int
) -> tuple[memfit.Step, torch.optim.Optimizer]:
    """The same for a whole batch, from a profile there already: measuring takes most of the time."""
    optimizer = torch.optim.AdamW(model.parameters())

    def find(current: memfit.Profile) -> memfit.Plan:
        return memfit.find_plan(current, memory=budget)

    accumulation = Accumulation(model, own_loss, None)
    step = memfit.Step(accumulation, find(profile), profile, optimizer=optimizer, find=find)
    return step, optimizer


def predicted_bytes(step: memfit.Step, *, first: bool) -> int:
    """The peak promised for a step; in the first the optimizer's state is born in ``optimizer.step()``."""
    if not first:
        return step.plan.predicted_peak_bytes
    return memfit.simulate(step.profile, step.plan, first_step=True).peak_bytes


def judged_steps(
    family: Family, model: nn.Module, batch: Batch, step: memfit.Step, optimizer: torch.optim.Optimizer
) -> Iterator[JudgedStep]:
    """Two steps with their optimizer, each beside the plain one of a twin at the same micro-batches."""
    twin = copy.deepcopy(model)
    twins_optimizer = torch.optim.AdamW(twin.parameters())
    parts = split(batch, parts_for(step.plan.rows, step.plan.micro_batch_size))
    shares = count.shares(_COUNTERS[family.count], parts) if family.count and len(parts) > 1 else None
    for number in range(2):
        torch.manual_seed(11 + number)
        plain = outcome_of(twin, accumulated(twin, own_loss, parts, shares))
        torch.manual_seed(11 + number)
        residents = [*model.parameters(), *model.buffers(), *batch.values(), *optimizer_state(optimizer)]
        resident = resident_bytes(residents)
        with PeakMeter("cpu") as meter:
            loss = step(batch)
            optimizer.step()
        found = differences(plain, outcome_of(model, loss))
        promised = predicted_bytes(step, first=number == 0)
        yield JudgedStep(promised, resident + meter.peak_bytes, found)
        twins_optimizer.step()
        for one in (optimizer, twins_optimizer):
            one.zero_grad()
