"""A byte-level GPT on Python's own standard library source: real data that every installation already has.

B rows, T bytes of context, C width, H heads.
"""

from __future__ import annotations

import math
import os
import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from memfit.workload import Workload

VOCABULARY = 256  # one token per byte value
_LEAST_CORPUS_BYTES = 1_000_000


@dataclass(frozen=True, slots=True)
class GPTConfig:
    """The size of a GPT.

    The default is sized so that a plain step at 64 rows needs more than 1 GiB, yet takes about a second
    and a half on two CPU cores: rather deep and narrow, for width costs time and depth costs memory.
    """

    layers: int = 12
    width: int = 160
    heads: int = 5
    context: int = 128
    dropout: float = 0.1


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.norm_attention = nn.LayerNorm(config.width)
        self.query_key_value = nn.Linear(config.width, 3 * config.width)
        self.project = nn.Linear(config.width, config.width)
        self.norm_mlp = nn.LayerNorm(config.width)
        self.expand = nn.Linear(config.width, 4 * config.width)
        self.contract = nn.Linear(4 * config.width, config.width)
        self.dropout = nn.Dropout(config.dropout)

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        """Returns causal self-attention over ``x``: [B, T, C]."""
        rows, length, width = x.shape
        split = self.query_key_value(x).view(rows, length, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, H, T, C/H]
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        joined: torch.Tensor = self.project(mixed.transpose(1, 2).reshape(rows, length, width))
        return joined

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the block's output: [B, T, C]."""
        x = x + self.dropout(self.attention(self.norm_attention(x)))
        hidden = F.gelu(self.expand(self.norm_mlp(x)))  # [B, T, 4C]
        out: torch.Tensor = x + self.dropout(self.contract(hidden))
        return out


class GPT(nn.Module):
    """A GPT over bytes: learned positions, pre-norm, head tied to the embedding."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, config.width)
        self.position = nn.Embedding(config.context, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # GPT-2's rule: what is added to the residual stream starts smaller by the depth.
                deep = name.endswith(("project.weight", "contract.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.layers) if deep else 0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Returns the logits [B, T, 256] of the byte after each of ``tokens`` [B, T]."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.dropout(self.embed(tokens) + self.position(places))  # [B, T, C]
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


@dataclass(frozen=True, slots=True)
class Crops:
    """Random crops of a corpus: batch ``index`` is a function of ``(seed, index)`` alone."""

    corpus: np.ndarray[tuple[int], np.dtype[np.uint8]]
    batch_size: int
    context: int
    seed: int
    device: str

    def __call__(self, index: int) -> dict[str, torch.Tensor]:
        """Returns batch ``index``: ``tokens`` and ``labels``, both [B, T], the labels one byte ahead."""
        draw = random.Random(f"{self.seed}/{index}")
        last = len(self.corpus) - self.context - 1
        starts = np.array([draw.randint(0, last) for _ in range(self.batch_size)])
        window = self.corpus[starts[:, None] + np.arange(self.context + 1)]  # [B, T + 1]
        crops = torch.from_numpy(window.astype(np.int64)).to(self.device)
        return {"tokens": crops[:, :-1].contiguous(), "labels": crops[:, 1:].contiguous()}


def next_byte_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Returns the mean cross-entropy over all bytes of the batch, in nats."""
    logits = model(batch["tokens"])  # [B, T, 256]
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())


def standard_library_source(folder: Path | None = None) -> bytes:
    """Returns the source of Python's standard library, its files joined in a fixed order.

    Args:
        folder: Where it lies; by default where this Python has it.

    Raises:
        ValueError: Less than 1 MB of it is there.
    """
    root = Path(sysconfig.get_path("stdlib")) if folder is None else folder
    corpus = b"\n".join(_read(path) for path in _source_files(root))
    if len(corpus) < _LEAST_CORPUS_BYTES:
        raise ValueError(
            f"Only {len(corpus):,} bytes of Python source are in {root}, and training needs 1,000,000. Use a "
            f"Python that has its standard library as files, or name another TARGET."
        )
    return corpus


def _source_files(root: Path) -> Iterator[Path]:
    """Yields the Python files under ``root`` that belong to Python, its tests left out, in a fixed order."""
    outside = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - outside)  # os.walk enters only those that are left
        yield from (Path(folder) / name for name in sorted(names) if name.endswith(".py"))


def _read(path: Path) -> bytes:
    """Returns the bytes of a file, none where it cannot be read (a broken link, a missing permission)."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def build_model(config: GPTConfig, seed: int, device: str) -> GPT:
    """Returns a GPT whose weights depend on ``seed`` alone; the caller's random state is untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = GPT(config)
    return model.to(device)


def workload(batch_size: int = 64, seed: int = 0, device: str = "cpu") -> Workload:
    """Returns the default job: a byte-level GPT learning to write Python."""
    config = GPTConfig()
    model = build_model(config, seed, device)
    corpus = np.frombuffer(standard_library_source(), dtype=np.uint8)
    return Workload(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=5e-4, betas=(0.9, 0.95), weight_decay=0.01),
        loss_fn=next_byte_loss,
        batches=Crops(corpus, batch_size, config.context, seed, device),
    )
