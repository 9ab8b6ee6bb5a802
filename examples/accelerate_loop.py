"""A loop with Accelerate: a memfit step takes the place of the forward and of accelerator.backward."""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import memfit.integrations.accelerate


def loss_fn(model, batch):
    rows, labels = batch
    return nn.functional.cross_entropy(model(rows), labels)


def train(folder=None, epochs=2):
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    layers = [m for _ in range(6) for m in (nn.Linear(128, 128), nn.GELU())]
    model = nn.Sequential(*layers, nn.Linear(128, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=8)
    data = TensorDataset(torch.randn(900, 128), torch.randint(10, (900,)))
    loader = DataLoader(data, batch_size=256)  # the effective batch; the last one has 132 rows
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)

    step = memfit.integrations.accelerate.fit(
        accelerator, model, loss_fn, next(iter(loader)), memory="2.2MiB", optimizer=optimizer
    )
    losses = []
    for _ in range(epochs):
        for batch in loader:
            loss = step(batch)  # was: loss = loss_fn(model, batch); accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(float(loss))
    if folder is not None:
        accelerator.save_state(str(folder))
    print(step.plan, step.verdict, f"losses {losses}", sep="\n")
    return losses, model


if __name__ == "__main__":
    train()
