"""Writes the table of results into README.md from the newest result files; no figure is typed.

python benchmarks/render.py [--check]
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- results: made by benchmarks/render.py -->", "<!-- end of results -->"


def newest(kind: str) -> tuple[Any, str]:
    """The rows of the newest result file of a kind, and where they come from."""
    files = sorted((ROOT / "benchmarks" / "results").glob(f"*_cpu_{kind}.json"))
    if not files:
        raise SystemExit(f"no result of benchmarks/{kind}.py yet: run make bench")
    data = json.loads(files[-1].read_text())
    return data["rows"], f"[{kind}](benchmarks/results/{files[-1].name})"


def table() -> str:
    """The table in Markdown."""
    zoo, zoo_file = newest("zoo")
    recompute, recompute_file = newest("recompute")
    large, large_file = newest("large")
    overhead, overhead_file = newest("overhead")
    ratios = [row["ratio"] for row in zoo]
    lines = [
        "| what | measured | run |",
        "|---|---|---|",
        f"| loss, gradients, buffers, random state against the plain step: {len(zoo)} runs over "
        f"{len({row['model'] for row in zoo})} models | "
        f"{sum(row['bitwise'] for row in zoo)} of {len(zoo)} bitwise equal | {zoo_file} |",
        f"| measured peak above the budget | {sum(r['measured_bytes'] > r['budget_bytes'] for r in zoo)} of "
        f"{len(zoo)} | {zoo_file} |",
        f"| predicted over measured peak: lowest, median, highest | {min(ratios):.5f}, "
        f"{statistics.median(ratios):.5f}, {max(ratios):.5f} | {zoo_file} |",
    ]
    for model in dict.fromkeys(row["model"] for row in recompute):
        own = [row for row in recompute if row["model"] == model]
        figures = ", ".join(f"{row['ratio']:.2f}" for row in own if "factor" in row)
        least = next(row["least_over_blocks"] for row in own if "least_over_blocks" in row)
        lines.append(
            f"| {model}: recompute seconds over those of `torch.utils.checkpoint` around every block, at 1, "
            f"1.5, 2 and 3 times its activation bytes | {figures} | {recompute_file} |"
        )
        lines.append(f"| {model}: least activation bytes over the same | {least:.2f} | {recompute_file} |")
    half = next(row for row in large["plans"] if row["share_of_activations"] == 0.5)
    slowest_s = max(row["plan_s"] for row in large["plans"])
    lines += [
        f"| Llama 7B, 4 x 2048 tokens, on two CPU cores: profile, slowest plan, real memory | "
        f"{large['profile_s']:.1f} s, {slowest_s:.1f} s, {large['real_memory_gib']:.1f} GiB | {large_file} |",
        f"| the same at half the activations (roofline seconds): extra over the plain step, certified gap | "
        f"{half['extra_over_plain_step']:.1%}, {half['gap_of_step']:.2%} of a step | {large_file} |",
        f"| the same in parts, least activation bytes over those of checkpointing every block, simulated | "
        f"{large['least_over_blocks']:.2f} | {large_file} |",
        f"| Llama 70B, 80 layers: slowest plan, certified gap | "
        f"{max(row['plan_s'] for row in large['plans_70b']):.1f} s, at most "
        f"{max(row['gap_of_step'] for row in large['plans_70b']):.2%} of a step | {large_file} |",
        f"| Python cost of an op outside the plan | {overhead['outside the plan']['us_per_op']:.1f} us | "
        f"{overhead_file} |",
    ]
    return "\n".join(lines)


def main() -> None:
    """Rewrites the README, or with ``--check`` says whether it would."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    made = f"{before}{BEGIN}\n{table()}\n{END}{after}"
    if options.check and made != text:
        raise SystemExit("README.md does not show the newest results: run python benchmarks/render.py")
    readme.write_text(made)


if __name__ == "__main__":
    main()
