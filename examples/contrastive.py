"""Contrastive training in two passes: which of all docstrings of the batch belongs to this name?"""

import ast
import zlib
from pathlib import Path

import torch
from torch import nn

import memfit

ROWS, WIDTH, EPOCHS = 1024, 256, 8


def tower():
    layers = [m for _ in range(4) for m in (nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.GELU())]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 64))


def outputs_fn(model, batch):  # a row for each row of the batch: these are there for all rows at once
    return tuple(nn.functional.normalize(model[side](batch[side])) for side in ("name", "text"))


def loss_fn(outputs, batch):  # compares each row with all others, so micro-batches alone would change it
    return nn.functional.cross_entropy(20 * outputs[0] @ outputs[1].T, torch.arange(ROWS))


def hashed(text):  # counts of its letter triples, in WIDTH bins
    triples = (text[i : i + 3].lower().encode() for i in range(len(text) - 2))
    return torch.bincount(
        torch.tensor([0, *(zlib.crc32(t) % WIDTH for t in triples)]), minlength=WIDTH
    ).sqrt()


def pairs():  # names and docstrings of Python's own functions and classes
    for file in sorted(Path(ast.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and (text := ast.get_docstring(node)):
                yield hashed(f"{file.stem} {node.name}"), hashed(text[:80])


def main():
    torch.manual_seed(0)
    model = nn.ModuleDict({"name": tower(), "text": tower()})
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    names, texts = (torch.stack(side) for side in zip(*pairs(), strict=True))
    order = torch.randperm(len(names)).split(ROWS)[:-1]
    batches = [{"name": names[rows], "text": texts[rows]} for rows in order] * EPOCHS
    options = {"optimizer": optimizer, "outputs_fn": outputs_fn, "micro_batch_size": 512}  # else it chooses
    step, losses = memfit.fit(model, loss_fn, batches[0], memory="23MiB", **options), []
    for batch in batches:
        losses.append(step(batch).item())  # the loss of all rows; .grad is its gradient
        optimizer.step()
        optimizer.zero_grad()
    print(step.plan, step.verdict, f"loss {losses[0]:.2f} at first, {losses[-1]:.2f} at last", sep="\n")
    return step, losses


if __name__ == "__main__":
    main()
