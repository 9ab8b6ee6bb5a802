"""A LightningModule as it is, trained within a stated memory: one entry of callbacks= is all that is new."""

import torch
from lightning import pytorch as pl
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from memfit.integrations.lightning import MemfitCallback


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        layers = [m for _ in range(6) for m in (nn.Linear(128, 128), nn.GELU())]
        self.net = nn.Sequential(*layers, nn.Linear(128, 10))

    def training_step(self, batch, batch_idx):
        rows, labels = batch
        scores = self.net(rows)
        loss = nn.functional.cross_entropy(scores, labels)
        self.log("loss", loss)
        self.log("accuracy", (scores.argmax(1) == labels).float().mean())
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def train(epochs=2):
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(900, 128), torch.randint(10, (900,)))
    memfit = MemfitCallback(memory="2.6MiB")
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=epochs, gradient_clip_val=1.0, callbacks=[memfit], **quiet
    )
    trainer.fit(Classifier(), DataLoader(data, batch_size=256))  # the effective batch
    seen = {name: float(value) for name, value in trainer.callback_metrics.items()}
    print(memfit.step.plan, memfit.step.verdict, seen, sep="\n")
    return trainer, memfit.step


if __name__ == "__main__":
    train()
