"""Tiny heads of every ``Auto`` class of ``transformers`` that builds from a generic configuration, offline.

A head is its task and the type of its model. Its configuration is the default one with every size made small
and every chance of dropping something made zero, so that one plain backward of the whole batch is the judge.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

import memfit
from memfit.errors import MemfitError
from memfit.runtime.doubled import Doubled

ROWS, TOKENS, VOCABULARY, LABELS, PAD = 7, 12, 99, 3, 1
MOST_PARAMETERS = 5_000_000

Batch = dict[str, Tensor]

# What a size is called, by model type; the smallest that most models accept.
_SMALL = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim", "d_ff"), 48),
    "encoder_hidden_size": 32, "n_inner": 48,
    **dict.fromkeys(("hidden_dim", "dim_ff", "ffn_hidden_size", "moe_intermediate_size", "d_inner"), 48),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "num_key_value_heads", "heads"), 4),
    **dict.fromkeys(("d_kv", "head_dim", "d_head", "kv_channels"), 8),
    **dict.fromkeys(("vocab_size", "decoder_vocab_size"), VOCABULARY),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_source_positions"), 64),
    **dict.fromkeys(("max_target_positions", "max_seq_len", "seq_length", "sliding_window"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "qk_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 16),
    "num_experts_per_tok": 2, "type_vocab_size": 2, "layerdrop": 0.0,
}  # fmt: skip
_LAYERS = (
    "num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers",
    "num_encoder_layers", "num_decoder_layers", "depth",
)  # fmt: skip
_TOKENS_OF = {"pad_token_id": PAD, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 2}


@dataclass(frozen=True)
class Task:
    """What a kind of head is trained on."""

    name: str
    models: dict[str, Any]
    batch: Callable[[], Batch]


def _read() -> Batch:
    """Rows of unlike lengths, padded on the right."""
    lengths = torch.tensor([12, 9, 5, 12, 7, 10, 4])
    mask = torch.arange(TOKENS) < lengths[:, None]
    ids = torch.randint(5, VOCABULARY, (ROWS, TOKENS))
    return {"input_ids": ids.masked_fill(~mask, PAD), "attention_mask": mask.long()}


def _classified() -> Batch:
    """One class a row; one row has none."""
    return {**_read(), "labels": torch.tensor([0, 2, 1, -100, 1, 0, 2])}


def _tagged() -> Batch:
    """One class a token; padding has none."""
    batch = _read()
    labels = torch.randint(0, LABELS, (ROWS, TOKENS))
    return {**batch, "labels": labels.masked_fill(batch["attention_mask"] == 0, -100)}


def _masked() -> Batch:
    """A few tokens of each row are to be found, in each row another number."""
    batch = _read()
    hidden = torch.arange(TOKENS) % torch.tensor([2, 3, 4, 2, 5, 3, 4])[:, None] == 0
    wanted = hidden & (batch["attention_mask"] == 1)
    labels = batch["input_ids"].masked_fill(~wanted, -100)
    return {**batch, "input_ids": batch["input_ids"].masked_fill(wanted, 4), "labels": labels}


def _continued() -> Batch:
    """The next token; padding and one prompt are not to be predicted."""
    batch = _read()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[3, :6] = -100
    return {**batch, "labels": labels}


def _translated() -> Batch:
    """A text and another one of unlike length."""
    lengths = torch.tensor([9, 4, 7, 2, 9, 5, 3])
    labels = torch.randint(5, VOCABULARY, (ROWS, 9)).masked_fill(torch.arange(9) >= lengths[:, None], -100)
    return {**_read(), "labels": labels}


TASKS = {
    name: Task(name, getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES"), batch)
    for name, mapping, batch in (
        ("seq2seq", "SEQ_TO_SEQ_CAUSAL_LM", _translated),
        ("masked", "MASKED_LM", _masked),
        ("token classification", "TOKEN_CLASSIFICATION", _tagged),
        ("sequence classification", "SEQUENCE_CLASSIFICATION", _classified),
        ("causal", "CAUSAL_LM", _continued),
    )
}


def small_config(model_type: str, layers: int = 1, *, drops: bool = False) -> Any:
    """The default configuration of a type, small; without dropout, unless the type's own is wanted."""
    config = transformers.AutoConfig.for_model(model_type)
    for part in (config, *(v for v in vars(config).values() if isinstance(v, transformers.PretrainedConfig))):
        for name in vars(part).copy():
            _shrink(part, name, layers, drops)
    config.num_labels = LABELS
    for name, value in _TOKENS_OF.items():
        setattr(config, name, value)
    return config


def _shrink(config: Any, name: str, layers: int, drops: bool) -> None:
    """Makes one entry small, where it has a number."""
    value = getattr(config, name, None)
    small = {**_SMALL, **dict.fromkeys(_LAYERS, layers)}
    if name in small and isinstance(value, (int, float)) and not isinstance(value, bool):
        setattr(config, name, min(value, small[name]) if value > 0 else value)
    elif isinstance(value, float) and ("drop" in name or name.endswith("_pdrop") or "jitter" in name):
        setattr(config, name, value if drops else 0.0)
    elif name == "layer_types" and isinstance(value, list):
        setattr(config, name, value[:layers])


def small_model(task: Task, model_type: str, config: Any) -> nn.Module:
    """A head in training mode.

    Raises:
        Exception: Whatever ``transformers`` says of such a configuration.
        ValueError: It is not small.
    """
    name = task.models[model_type]
    name = name if isinstance(name, str) else name[0]
    model_class = getattr(transformers, name)
    with torch.device("meta"):
        size = sum(p.numel() for p in model_class(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size:,} parameters")
    model: nn.Module = model_class(config).train()
    return model


def build(task: str, model_type: str) -> nn.Module:
    """The head in float64, with nothing dropped; raises what :func:`small_model` does."""
    config = small_config(model_type)
    config.use_cache = False
    config._experts_implementation = "eager"  # the others know no float64
    model = small_model(TASKS[task], model_type, config).double()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def batch_for(task: Task, model: nn.Module) -> Batch:
    """A batch that the head takes: some know no attention mask."""
    taken = inspect.signature(model.forward).parameters
    batch = task.batch()
    return {name: leaf for name, leaf in batch.items() if name in taken or "kwargs" in taken}


def own_loss(model: Any, batch: Batch) -> Tensor:
    """The loss that a head computes itself, in float64 where it would go down to float32."""
    with Doubled():
        loss: Tensor = model(**batch).loss
    return loss


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What ``transformers`` says of strange configurations is not heard."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(logging.ERROR)
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)
        transformers.logging.set_verbosity(verbosity)


@dataclass(frozen=True)
class Outcome:
    """What became of a head: no plain step to compare with, refused with a reason, or accepted with an error.

    ``failed``: memfit raised what it does not raise by design.
    """

    built: bool
    reason: str = ""
    owner: str = ""
    counter: str | None = None
    relative_error: float | None = None
    parts: int = 0
    failed: bool = False


def outcome(task: str, model_type: str, count: str = "auto") -> Outcome:
    """Fits a head at four unequal micro-batches and compares with one plain backward of the whole batch."""
    torch.manual_seed(0)
    try:
        with quiet():
            model = build(task, model_type)
            batch = batch_for(TASKS[task], model)
            loss = own_loss(model, batch)
            loss.backward()
    except Exception as error:
        return Outcome(False, reason=_told(error))
    plain = _gradient(model)
    if not bool(plain.isfinite().all()) or not bool(plain.any()):
        return Outcome(False, reason="the plain gradient is zero or not finite")
    model.zero_grad()
    try:
        with quiet():
            step = memfit.fit(model, own_loss, batch, memory="8GiB", micro_batch_size=2, count=count)
            step(batch)
    except MemfitError as error:
        return Outcome(True, reason=str(error), owner=getattr(error, "owner", ""))
    except Exception as error:
        return Outcome(True, reason=_told(error), failed=True)
    relative = float((_gradient(model) - plain).norm() / plain.norm())
    counter = count if step.audit is None else step.audit.counter
    return Outcome(True, "", "", counter, relative, step.plan.gradient_accumulation_steps)


def _told(error: Exception) -> str:
    """An error in one short line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _gradient(model: nn.Module) -> Tensor:
    """All gradients in one vector; a parameter without one has zeros."""
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).detach().flatten() for p in model.parameters()]
    )
