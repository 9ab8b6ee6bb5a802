"""Trains a ResNet on crops of photographs. BatchNorm must see its batch whole: memfit recomputes."""

import random

import torch
from skimage import data
from torch import nn

import memfit

PHOTOGRAPHS = [data.astronaut(), data.cat(), data.coffee(), data.rocket()]  # they come with scikit-image
ROWS, PIXELS, STEPS = 32, 48, 12


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        first = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs)
        second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)
        self.body = nn.Sequential(*first, nn.ReLU(inplace=True), *second)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x):
        return torch.relu_(self.body(x) + self.shortcut(x))


def resnet(width=16):
    blocks = (Block(width << max(0, i - 1), width << i, 2 if i else 1) for i in range(4))
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, len(PHOTOGRAPHS))
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), *blocks, *head)


def crops(draw):  # images [ROWS, 3, PIXELS, PIXELS] in -1..1, and which photograph each is of
    labels, images = [draw.randrange(len(PHOTOGRAPHS)) for _ in range(ROWS)], []
    for photograph in (PHOTOGRAPHS[label] for label in labels):
        top, left = (draw.randrange(size - PIXELS) for size in photograph.shape[:2])
        images.append(torch.from_numpy(photograph[top : top + PIXELS, left : left + PIXELS].copy()))
    return torch.stack(images).permute(0, 3, 1, 2) / 127.5 - 1, torch.tensor(labels)


def loss_fn(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def main():
    torch.manual_seed(0)
    model, draw, losses = resnet(), random.Random(0), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    step = memfit.fit(model, loss_fn, crops(draw), memory="36MiB", optimizer=optimizer)
    for _ in range(STEPS):
        losses.append(step(crops(draw)).item())  # forward and backward of all rows
        optimizer.step()
        optimizer.zero_grad()
    print(step.plan, step.verdict, f"loss {losses[0]:.2f} at first, {losses[-1]:.2f} at last", sep="\n")
    return step, losses


if __name__ == "__main__":
    main()
