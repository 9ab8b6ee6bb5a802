"""The example of the README: a network with BatchNorm, which must see its batch whole."""

import torch
from torch import nn

import memfit

blocks = [
    m for _ in range(10) for m in (nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(inplace=True))
]
model = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), *blocks, nn.Flatten(), nn.Linear(32 * 32 * 32, 10))
optimizer = torch.optim.AdamW(model.parameters())
loss_fn = lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1])  # noqa: E731
batch = (torch.randn(64, 3, 32, 32), torch.randint(10, (64,)))

step = memfit.fit(model, loss_fn, batch, memory="128MiB", optimizer=optimizer)
loss = step(batch)  # forward and backward of the whole batch; .grad is exact
optimizer.step()
optimizer.zero_grad()
print(step.plan, step.verdict, sep="\n")
