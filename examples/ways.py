"""The pictures of docs/how_it_works.md: ways to run one step of a GPT, predicted without a GPU.

python examples/ways.py [docs/images]
"""

from __future__ import annotations

import sys
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import torch
import vl_convert
from PIL import Image

import memfit
from memfit.report import figures
from memfit.report.contents import Planned, contents
from memfit.report.reading import Source
from memfit.runtime.fake import fake_tensors
from memfit.workloads.text import GPT, GPTConfig, next_byte_loss

TOKENS = 1024


def profiled(rows: int, device: str) -> memfit.Profile:
    """One step of a GPT as large as GPT-2, but over bytes, in bfloat16 with AdamW; on fake tensors."""
    with fake_tensors():
        model = GPT(GPTConfig(layers=12, width=768, heads=12, context=TOKENS)).to(torch.bfloat16).train()
        tokens = torch.randint(256, (rows, TOKENS))
        optimizer = torch.optim.AdamW(model.parameters())
        batch = {"tokens": tokens, "labels": tokens}
        return memfit.profile(model, next_byte_loss, batch, optimizer=optimizer, device=device)


def drawn(profile: memfit.Profile, plan: memfit.Plan, plans: int = 2) -> Planned:
    """A plan with everything a picture shows."""
    found = contents(Source("GPT", "python examples/ways.py", plan, profile), plans=plans).planned
    assert found is not None
    return found


def two_ways() -> dict[str, figures.Chart]:
    """16 rows on an H100: plain, and in micro-batches or recomputing in the same memory."""
    profile = profiled(16, "h100")
    parts = memfit.find_plan(profile, memory="1TiB", micro_batch_size=4)
    parts = replace(parts, budget_bytes=parts.predicted_peak_bytes)
    best = drawn(profile, memfit.find_plan(profile, memory=parts.budget_bytes))
    own = [p.choices[p.chosen] for p in (drawn(profile, parts), best)]
    named = [("plain", best.plain), ("micro-batches", own[0]), ("recomputing", own[1])]
    scale = figures.axes(replace(best, choices=tuple(own), chosen=1))
    print(*(f"{name}: {choice.plan}" for name, choice in named), sep="\n\n")
    return {
        "plain": figures.timelines(named[:1], scale, height=240),
        "ways": figures.timelines(named, scale, height=150),
    }


def frontier() -> figures.Chart:
    """96 rows on an RTX 4090, which plainly needs more than the card has."""
    profile = profiled(96, "rtx4090")
    found = drawn(profile, memfit.find_plan(profile, memory="21GiB"), plans=16)
    tables = {"plans": figures.plan_rows(found), "hand": figures.hand_rows(found), "here": []}
    chart = figures.frontier(found, tables, width=720, height=320)
    return chart.configure(**figures.config(figures.LIGHT, is_dark=False))


def main() -> None:
    """Draws all of them, in few colours so that the files are small."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "docs" / "images"
    for name, chart in {**two_ways(), "frontier": frontier()}.items():
        drawing = Image.open(BytesIO(vl_convert.vegalite_to_png(chart.to_dict(), scale=1.5)))
        drawing.quantize(128).save(folder / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
