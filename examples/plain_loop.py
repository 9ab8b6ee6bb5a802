"""A loop of your own: schedule, clipping, an average of the weights, and a run that can be resumed.

python examples/plain_loop.py [FOLDER]      # a second run with the same FOLDER goes on where the first ended
"""

import sys
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import memfit


def loss_fn(model, batch):
    rows, labels = batch
    return nn.functional.cross_entropy(model(rows), labels)


def train(path, steps, micro_batch_size=None):
    torch.manual_seed(0)
    layers = [m for _ in range(6) for m in (nn.Linear(128, 128), nn.GELU(), nn.Dropout(0.1))]
    model = nn.Sequential(*layers, nn.Linear(128, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=20)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "average": average}
    data = [(torch.randn(256, 128), torch.randint(10, (256,))) for _ in range(20)]
    saved = torch.load(path) if path.exists() else None
    profile = memfit.Profile.from_json(saved["profile"]) if saved else None
    # Micro-batches of the same size add up in the same order: a resumed run is the same to the bit.
    rows = saved["rows"] if saved else micro_batch_size
    options = {"memory": "3MiB", "optimizer": optimizer, "micro_batch_size": rows}
    step = memfit.fit(model, loss_fn, data[0], profile=profile, **options)
    if saved:
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        torch.set_rng_state(saved["random"])
    losses = []
    for number in range(saved["done"] if saved else 0, steps):
        loss = step(data[number])  # forward and backward of all 256 rows
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        average.update_parameters(model)
        losses.append(float(loss))

    state = {name: part.state_dict() for name, part in parts.items()}
    state |= {"done": steps, "random": torch.get_rng_state(), "rows": step.plan.micro_batch_size}
    torch.save(state | {"profile": step.profile.to_json()}, path)
    print(step.plan, step.verdict, f"losses {losses}", sep="\n")
    return losses, model


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
    train(folder / "state.pt", steps=20 if (folder / "state.pt").exists() else 10)
