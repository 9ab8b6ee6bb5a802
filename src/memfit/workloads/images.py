"""A small ResNet on crops of scikit-image's bundled photographs: from which photograph is this crop?

Real convolutions, BatchNorm and in-place writes. BatchNorm looks across the rows of a batch, so this batch
cannot be split: everything must come from recomputation.
"""

from __future__ import annotations

import importlib.util
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from memfit.workload import Workload

# Those that the scikit-image wheel itself contains; the others of skimage.data are downloads.
PHOTOGRAPHS = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
)
_LEAST_PHOTOGRAPHS = 4
CROP_PIXELS = 64

Photograph = np.ndarray[tuple[int, int, int], np.dtype[np.uint8]]  # [height, width, 3]


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, with the in-place writes of torchvision's ResNet."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the block's output: [batch, outputs, height / stride, width / stride]."""
        out: torch.Tensor = self.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        out += self.shortcut(x)
        activated: torch.Tensor = self.relu(out)
        return activated


class ResNet(nn.Module):
    """A ResNet of four stages of two blocks for 64-pixel crops."""

    def __init__(self, classes: int, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        channels = [width, width, 2 * width, 4 * width, 8 * width]
        blocks: list[nn.Module] = []
        for stage in range(4):
            stride = 1 if stage == 0 else 2
            blocks.append(ResidualBlock(channels[stage], channels[stage + 1], stride))
            blocks.append(ResidualBlock(channels[stage + 1], channels[stage + 1], 1))
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels[-1], classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the logits [batch, classes] of ``images`` [batch, 3, height, width]."""
        features = self.blocks(self.stem(images))  # [batch, 8 * width, height / 8, width / 8]
        logits: torch.Tensor = self.head(features.mean(dim=(2, 3)))
        return logits


@dataclass(frozen=True, slots=True)
class PhotoCrops:
    """Random crops of photographs: batch ``index`` is a function of ``(seed, index)`` alone."""

    photographs: tuple[Photograph, ...]
    batch_size: int
    seed: int
    device: str

    def __call__(self, index: int) -> dict[str, torch.Tensor]:
        """Returns batch ``index``: ``images`` [batch, 3, 64, 64] in -1..1 and ``labels`` [batch]."""
        draw = random.Random(f"{self.seed}/{index}")
        labels = [draw.randrange(len(self.photographs)) for _ in range(self.batch_size)]
        crops = np.stack([_crop(self.photographs[label], draw) for label in labels])
        images = torch.from_numpy(crops).permute(0, 3, 1, 2).float().div(127.5).sub(1.0).contiguous()
        return {
            "images": images.to(self.device),
            "labels": torch.from_numpy(np.array(labels, dtype=np.int64)).to(self.device),
        }


def _crop(photograph: Photograph, draw: random.Random) -> Photograph:
    """Returns a random square of ``photograph``, mirrored half of the time."""
    height, width, _ = photograph.shape
    top = draw.randint(0, height - CROP_PIXELS)
    left = draw.randint(0, width - CROP_PIXELS)
    square = photograph[top : top + CROP_PIXELS, left : left + CROP_PIXELS]
    return square[:, ::-1] if draw.random() < 0.5 else square


def photograph_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Returns the mean cross-entropy over the rows of the batch, in nats."""
    return F.cross_entropy(model(batch["images"]), batch["labels"])


def bundled_photographs(folder: Path | None = None) -> tuple[Photograph, ...]:
    """Returns those of ``PHOTOGRAPHS`` that lie in the scikit-image installation, as RGB.

    Args:
        folder: Where they lie; by default the data folder of the installed scikit-image.

    Raises:
        ValueError: scikit-image is not installed, or fewer than four photographs are there.
    """
    root = _skimage_data() if folder is None else folder
    paths = [root / name for name in PHOTOGRAPHS if (root / name).is_file()]
    if len(paths) < _LEAST_PHOTOGRAPHS:
        raise ValueError(
            f"Only {len(paths)} of the bundled photographs are in {root}, and at least {_LEAST_PHOTOGRAPHS} "
            f"are needed. Install scikit-image again: pip install --force-reinstall scikit-image."
        )
    return tuple(_rgb(path) for path in paths)


def _skimage_data() -> Path:
    """Returns scikit-image's data folder without importing scikit-image."""
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise ValueError("The photographs come with scikit-image: pip install scikit-image.")
    return Path(spec.origin).parent / "data"


def _rgb(path: Path) -> Photograph:
    """Returns a photograph as [height, width, 3] bytes."""
    # Pillow, which scikit-image requires, and not skimage.data: that may try to download.
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def workload(batch_size: int = 32, seed: int = 0, device: str = "cpu") -> Workload:
    """Returns the second job: a ResNet that tells photographs apart by a crop."""
    photographs = bundled_photographs()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = ResNet(classes=len(photographs))
    model.to(device)
    return Workload(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3),
        loss_fn=photograph_loss,
        batches=PhotoCrops(photographs, batch_size, seed, device),
    )
