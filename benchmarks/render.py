"""Writes the results into README.md and docs/ from the newest result files; no figure is typed.

python benchmarks/render.py [--check]    (the picture of the peers is drawn, and not checked)
"""

from __future__ import annotations

import argparse
import statistics

import peer_tables
import zoo_tables
from figures import ROOT, newest
from peer_picture import write_picture

from pages import filled

Row = tuple[str, str, str]
_EXACT = 1e-10  # relative error of a gradient in float64
BEGIN, END = "<!-- results: made by benchmarks/render.py -->", "<!-- end of results -->"


def table() -> str:
    """The table in Markdown."""
    lines = ["| what | measured | run |", "|---|---|---|"]
    for part in (
        _promises(),
        _operators(),
        _families(),
        _accumulation(),
        _heads(),
        _rescue(),
        _frameworks(),
        _ranks(),
        _rivals(),
        _peers(),
        _large(),
        _gaps(),
        _overhead(),
    ):
        lines += [f"| {what} | {measured} | {run} |" for what, measured, run in part]
    return "\n".join(lines)


def _promises() -> list[Row]:
    """Every model at three budgets."""
    zoo, run = newest("zoo")
    families = zoo_tables.judged(zoo_tables.of_group(zoo_tables.OF_TRANSFORMERS))
    others = zoo_tables.judged(zoo)
    runs = zoo_tables.runs_of(zoo)
    planned = sum(row["status"] == "planned" for row in others)
    mended = sum(found["is_mended"] for found in runs)
    return [
        (
            f"{len(families)} families of `transformers` and {len(others) - len(families)} other models: "
            "planned; refused with the reason, or raising what the plain step raises; failed",
            f"{planned} of {len(others)}; {sum(row['status'] in ('refused', 'raises') for row in others)}; "
            f"{sum(row['status'] == 'failed' for row in others)}",
            run,
        ),
        (
            f"loss, gradients, buffers, random state against the plain step: {len(runs)} runs, from the "
            "least memory to no recomputation",
            f"{len(runs) - zoo_tables.wrong(zoo)} of {len(runs)} bitwise equal",
            run,
        ),
        (
            "first prediction too low, so that a first step went above it; each such step noticed, and "
            "planned again or was undone and named the memory it needs; peaks above the budget then",
            f"{mended} of {len(runs)}; {zoo_tables.above(zoo)}",
            run,
        ),
        ("first prediction over measured peak: lowest, median, highest", zoo_tables.spread(zoo), run),
    ]


def _operators() -> list[Row]:
    """Every operator that PyTorch has samples of."""
    found, run = newest("operator_database")
    samples = found["samples"]
    steps = samples["equal"] + samples.get("differs", 0) + samples.get("raises", 0)
    return [
        (
            f"samples of {found['operators']} operators from PyTorch's own database, each in a step that "
            "recomputes all it can: gradients against the plain step",
            f"{samples['equal']:,} of {steps:,} bitwise equal",
            run,
        )
    ]


def _families() -> list[Row]:
    """Whole steps of many families, the optimizer included."""
    rows, run = newest("families")
    models = len({row["model"] for row in rows})
    equal = sum(not row["differences"] for row in rows)
    return [
        (
            f"{models} families of `transformers`, {len(rows)} runs of two whole steps with AdamW: bitwise "
            "equal",
            f"{equal} of {len(rows)}",
            run,
        ),
        *(
            (
                f"predicted over measured peak of the {which} step, `optimizer.step()` included: lowest, "
                "median, highest",
                _spread([row[f"{which}_ratio"] for row in rows]),
                run,
            )
            for which in ("first", "second")
        ),
    ]


def _accumulation() -> list[Row]:
    """Losses of every class, coupled ones, and reduced precision."""
    rows, run = newest("accumulation")
    losses, passes, halves = (
        [row for row in rows if row["kind"] == kind] for kind in ("loss", "two passes", "bfloat16")
    )
    errors = [row["error"] for row in losses if row["error"] is not None]
    half = {row["name"]: row["error"] for row in halves}
    names = ("plain accumulation", "rounded once", "float32 sums kept")
    return [
        (
            f"{len(losses)} losses of every class: class right; worst relative gradient error of those "
            "split, float64, unequal micro-batches",
            f"{sum(row['is_right'] for row in losses)}; {max(errors):.0e}",
            run,
        ),
        (
            f"{len(passes)} losses that couple the rows, in two passes: the same error",
            f"{max(row['error'] for row in passes):.0e}",
            run,
        ),
        (
            "256 micro-batches of a bfloat16 model, error of their sum: plain accumulation, memfit, memfit "
            "with the float32 sums kept",
            ", ".join(f"{half[name]:.1e}" for name in names),
            run,
        ),
    ]


def _heads() -> list[Row]:
    """Tiny heads of transformers."""
    rows, run = newest("heads")
    built = [row for row in rows if row["built"]]
    ran = [row["relative_error"] for row in built if row["relative_error"] is not None]
    refused = sum(row["relative_error"] is None and not row["failed"] for row in built)
    stopped = sum(bool(row["failed"]) for row in built)
    return [
        (
            f"{len(built)} heads of `transformers`, 4 unequal micro-batches: exact, refused with the reason, "
            "stopped by an error, silently wrong; worst error",
            f"{sum(e <= _EXACT for e in ran)}, {refused}, {stopped}, {sum(e > _EXACT for e in ran)}; "
            f"{max(ran):.0e}",
            run,
        )
    ]


def _rescue() -> list[Row]:
    """Trainings that run out of memory."""
    rows, run = newest("rescue")
    random = [row for row in rows if "outages" in row]
    differences = sum(len(row["differences"]) for row in rows)
    return [
        (
            f"{sum(row['trainings'] for row in random)} trainings with "
            f"{sum(row['outages'] for row in random)} injected out-of-memory errors: differences from the "
            "undisturbed ones, to the bit",
            str(differences),
            run,
        )
    ]


def _frameworks() -> list[Row]:
    """Trainings in other people's loops, against the same loop with the whole batch and no memfit."""
    found = []
    for name, kind in (("the Hugging Face Trainer", "trainer"), ("Lightning", "lightning")):
        rows, run = newest(kind)
        losses, weights = (max(row[what] for row in rows) for what in ("losses", "weights"))
        held = sum(row["held"] for row in rows)
        found.append(
            (
                f"{name} with memfit against the plain one at the whole batch, {len(rows)} trainings of "
                f"{rows[0]['steps']} steps: worst relative difference of losses, of final weights (biases of "
                "attention keys apart, whose true gradient is zero); budget held",
                f"{losses:.0e}, {weights:.0e}; {held} of {len(rows)}",
                run,
            )
        )
    return found


def _ranks() -> list[Row]:
    """Trainings on several processes, against one process with the whole batch."""
    rows, run = newest("ranks")
    found = []
    for engine in dict.fromkeys(row["engine"] for row in rows):
        own = [row for row in rows if row["engine"] == engine]
        counts = " and ".join(str(ranks) for ranks in dict.fromkeys(row["ranks"] for row in own))
        errors = [
            max(row["weights_error"] for row in own if row["dtype"].endswith(dtype))
            for dtype in ("float64", "float32")
        ]
        ratios = [row["predicted_over_measured"] for row in own]
        held = sum(row["never_below"] for row in own)
        found.append(
            (
                f"{engine} on {counts} processes against one with the whole batch, {len(own)} trainings of "
                f"{own[0]['steps']} steps: worst relative difference of final weights in float64, float32; "
                "predicted over measured peak of the highest rank: lowest, median, highest; never above",
                f"{errors[0]:.0e}, {errors[1]:.0e}; {_spread(ratios)}; {held} of {len(own)}",
                run,
            )
        )
    return found


def _spread(ratios: list[float]) -> str:
    """Lowest, median, highest."""
    return f"{min(ratios):.5f}, {statistics.median(ratios):.5f}, {max(ratios):.5f}"


def _rivals() -> list[Row]:
    """Against checkpointing every block."""
    rows, run = newest("recompute")
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        figures = ", ".join(f"{row['ratio']:.2f}" for row in own if "factor" in row)
        least = next(row["least_over_blocks"] for row in own if "least_over_blocks" in row)
        what = f"{model}: recompute seconds over those of `torch.utils.checkpoint` around every block, at 1, "
        lines.append((f"{what}1.5, 2 and 3 times its activation bytes", figures, run))
        lines.append((f"{model}: least activation bytes over the same", f"{least:.2f}", run))
    return lines


def _peers() -> list[Row]:
    """Every peer at its best setting, in its own measured memory."""
    run = newest("peers")[1]
    reach = peer_tables.reach()
    said = "median of the models' medians, highest median, highest of all"
    return [
        (
            f"{len(reach)} models: memfit's extra CPU time over that of the best of every-k-th-block, "
            "selective, Hugging Face's and optimal block checkpointing in the same measured memory: "
            f"{said}",
            _ratios("extra_cpu_s"),
            run,
        ),
        (f"the same by counted operators, without Python: {said}", _ratios("again_s"), run),
        (
            "the same models in a fixed memory: largest batch of the best peer, and of memfit",
            "; ".join(f"{row[0]} {row[5].split()[0]}, {row[6]}" for row in reach),
            run,
        ),
    ]


def _ratios(seconds: str) -> str:
    """memfit's over the best peer's, over models and budgets."""
    ratios = [[duel.ratio for duel in peer_tables.duels(m, seconds)] for m in peer_tables.models()]
    medians = [statistics.median(found) for found in ratios]
    return f"{statistics.median(medians):.2f}, {max(medians):.2f}, {max(map(max, ratios)):.2f}"


def _large() -> list[Row]:
    """Large models on fake tensors."""
    large, run = newest("large")
    seven = [row for row in large["plans"] if (row["model"], row["dtype"]) == ("Llama 7B", "bfloat16")]
    lines = [
        (
            "Llama 7B, 4 x 2048 tokens, on two CPU cores: profile, slowest plan, real memory",
            f"{large['profile_7b_s']:.1f} s, {max(row['plan_s'] for row in seven):.1f} s, "
            f"{large['real_memory_gib']:.1f} GiB",
            run,
        ),
        (
            "Llama 70B, 80 layers: slowest plan, certified gap",
            f"{max(row['plan_s'] for row in large['plans_70b']):.1f} s, at most "
            f"{max(row['gap_of_step'] for row in large['plans_70b']):.2%} of a step",
            run,
        ),
        (
            "12-layer GPT-2: slowest plan, whole frontier",
            f"{max(row['plan_s'] for row in large['plans_12']):.1f} s, {large['frontier_12_s']:.1f} s",
            run,
        ),
    ]
    for model, dtype in dict.fromkeys((row["model"], row["dtype"]) for row in large["plans"]):
        own = [row for row in large["plans"] if (row["model"], row["dtype"]) == (model, dtype)]
        extra = ", ".join(f"{row['extra_over_plain_step']:.1%}" for row in own)
        what = f"{model} in {dtype}, H100 roofline: extra over the plain step at 60, 50, 40 % of its "
        lines.append((f"{what}activations", extra, run))
    what = "Llama 7B: least activation bytes over those of checkpointing every block, both simulated"
    return [*lines, (what, f"{large['least_over_blocks']:.2f}", run)]


def _gaps() -> list[Row]:
    """Certificates and law 5."""
    rows, run = newest("gaps")
    breaches = sum(row["slower_with_more_memory"] + row["higher_with_less_memory"] for row in rows)
    worst = "; ".join(f"{row['model']} {row['worst_gap_of_step']:.2%}" for row in rows)
    return [
        (f"certified gap, worst of {rows[0]['budgets']} budgets, in a step", worst, run),
        ("more memory slower, or less memory higher", f"{breaches}", run),
    ]


def _overhead() -> list[Row]:
    """Python."""
    ops, run = newest("overhead")
    step, of_steps = newest("step_overhead")
    names = ("outside the plan", "named elsewhere", "replayed", "an empty mode")
    of_ops = [f"{ops[name]['us_per_op']:.1f} us" for name in names]
    grown = [f"{step['grows_by'][name]:+.0%}" for name in step["grows_by"]]
    return [
        (
            "Python cost of an op outside the plan, of one whose kind the plan names elsewhere, of a "
            "replayed op, of an op in a dispatch mode that does nothing",
            ", ".join(of_ops),
            run,
        ),
        (
            f"CPU time outside of kernels, 12-layer GPT-2: memfit recomputing {step['share_of_forward']:.0%} "
            "of the forward, every block checkpointed, selective checkpointing",
            ", ".join(grown),
            of_steps,
        ),
        (
            "Python objects that this plan holds, of the activations",
            f"{step['held_bytes'] / step['activation_bytes']:.2%}",
            of_steps,
        ),
    ]


def main() -> None:
    """Rewrites README and pages, or with ``--check`` says which it would."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        text = path.read_text("utf-8")
        name = path.relative_to(ROOT)
        made = _readme(text) if name.name == "README.md" else filled(text, "../" * (len(name.parts) - 1))
        if options.check and made != text:
            raise SystemExit(f"{name} does not show the newest results: run python benchmarks/render.py")
        if made != text:
            path.write_text(made, "utf-8")
    if not options.check:
        write_picture(ROOT / "docs" / "images" / "peers.png")


def _readme(text: str) -> str:
    """The README with its table."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    main()
