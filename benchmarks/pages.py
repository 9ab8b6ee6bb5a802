"""The tables of measured figures in the pages under docs/; ``benchmarks/render.py`` writes them there."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import peer_tables
import zoo_tables
from figures import newest

from memfit.units import format_bytes, format_seconds

MARKED = re.compile(r"(<!-- measured: (\S+) -->\n).*?(<!-- end of measured -->)", re.DOTALL)
_TRAPS = {
    "mse mean": "a mean over rows, the last micro-batch shorter",
    "token ce": "cross-entropy over tokens, some ignored (-100)",
    "causal ce": "the same, labels shifted by one",
    "class-weighted ce": "cross-entropy with class weights",
    "ce sum": "a sum, divided all the same",
    "token ce + auxiliary loss by rows": "a mean over tokens plus a mean over rows, in one number",
    "rmse": "the root of a mean",
    "InfoNCE": "contrastive (InfoNCE)",
    "normalised advantages": "advantages normalised over the batch",
    "BatchNorm": "BatchNorm in training mode",
    "spectral norm": "spectral norm, which changes in each forward",
    "clamping hook": "a hook that clamps the gradient",
}


def filled(text: str, where: str) -> str:
    """A page with every marked table made anew; ``where`` leads from it to the root, such as "../"."""
    return MARKED.sub(lambda found: f"{found[1]}\n{_TABLES[found[2]](where)}\n\n{found[3]}", text)


def _table(head: str, rows: Iterable[Iterable[object]], kind: str, where: str) -> str:
    """A table in Markdown, and the run it is from."""
    names = head.split("|")
    lines = [f"| {' | '.join(n.strip() for n in names)} |", "|" + "---|" * len(names)]
    lines += [f"| {' | '.join(str(cell) for cell in row)} |" for row in rows]
    _, run = newest(kind, where)
    return "\n".join([*lines, "", f"Run: {run}, `benchmarks/{kind}.py`."])


def _of(kind: str, /, **wanted: object) -> list[dict[str, Any]]:
    """The rows of the newest result that are as wanted."""
    rows: list[dict[str, Any]] = newest(kind)[0]
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]


def _traps(where: str) -> str:
    rows = (
        (
            _TRAPS[row["name"]],
            f"{row['by_hand']:.1%}",
            f"{row['memfit']:.0e}" if row["is_split"] else f"{row['memfit']:.0f}, batch kept whole",
        )
        for row in _of("traps", kind="trap")
    )
    return _table(
        "the loss, or what the model does | error by hand | error with memfit", rows, "traps", where
    )


def _coupled(where: str) -> str:
    rows = (
        (r["name"].replace("_", " "), f"{r['error']:.0e}") for r in _of("accumulation", kind="two passes")
    )
    return _table("loss that couples the rows | error in two passes", rows, "accumulation", where)


def _bfloat16(where: str) -> str:
    errors = {row["name"]: row["error"] for row in _of("accumulation", kind="bfloat16")}
    names = {
        "plain accumulation": "by hand, in bfloat16",
        "rounded once": "memfit: float32, rounded once at the end",
        "float32 sums kept": "memfit, with `parameter.grad_dtype = torch.float32`",
    }
    rows = ((told, f"{errors[name]:.1e}") for name, told in names.items())
    return _table("256 micro-batches added up | error of the sum", rows, "accumulation", where)


def _parts(where: str) -> str:
    rows = (
        (
            f"{64 // row['micro_batch_size']} x {row['micro_batch_size']}",
            format_bytes(row["peak_bytes"]),
            format_seconds(row["step_cpu_s"]),
        )
        for row in _of("traps", kind="parts")
    )
    return _table("64 rows as | peak | processor time of a step", rows, "traps", where)


def _wide(where: str) -> str:
    rows = (
        (
            f"{16 // row['micro_batch_size']} x {row['micro_batch_size']}",
            format_bytes(row["peak_bytes"]),
            format_bytes(row["gradients_bytes"]),
        )
        for row in _of("traps", kind="wide")
    )
    return _table("16 rows as | peak | of which gradients", rows, "traps", where)


def _recomputing(where: str) -> str:
    plain = _of("traps", kind="parts", micro_batch_size=64)[0]
    blocks = _of("traps", kind="every block")[0]
    ways = [("nothing recomputed", plain), ("every block checkpointed", blocks)]
    ways += [(f"memfit, {format_bytes(r['budget_bytes'])}", r) for r in _of("traps", kind="memfit")]
    rows = (
        (
            name,
            format_bytes(row["peak_bytes"]),
            format_seconds(row["step_cpu_s"]),
            f"{row['step_cpu_s'] / plain['step_cpu_s'] - 1:+.0%}",
        )
        for name, row in ways
    )
    return _table("all 64 rows at once | peak | processor time of a step | more time", rows, "traps", where)


def _rivals(where: str) -> str:
    rows = []
    for model in dict.fromkeys(row["model"] for row in _of("recompute")):
        own = [row for row in _of("recompute", model=model) if "factor" in row]
        least = next(
            r["least_over_blocks"] for r in _of("recompute", model=model) if "least_over_blocks" in r
        )
        rows.append((model, *(f"{row['ratio']:.0%}" for row in own), f"{least:.0%}"))
    head = "model | same memory | 1.5 times | 2 times | 3 times | least memory that works"
    return _table(head, rows, "recompute", where)


def _large(where: str) -> str:
    large = newest("large")[0]
    rows = []
    for model, dtype in dict.fromkeys((row["model"], row["dtype"]) for row in large["plans"]):
        own = [row for row in large["plans"] if (row["model"], row["dtype"]) == (model, dtype)]
        rows.append((f"{model}, {dtype}", *(f"{row['extra_over_plain_step']:.1%}" for row in own)))
    return _table("predicted for an H100 | 60 % | 50 % | 40 % of the activations", rows, "large", where)


def _heads(where: str) -> str:
    built = _of("heads", built=True)
    ran = [row["relative_error"] for row in built if row["relative_error"] is not None]
    rows = [(len(built), len(ran), f"{max(ran):.0e}", len(built) - len(ran))]
    head = "heads of `transformers` | split | worst error of a gradient | refused, with the reason"
    return _table(head, rows, "heads", where)


def _audit(where: str) -> str:
    rows = (
        (
            row["model"],
            "coupled" if row["counter"] is None else "the model's own",
            f"{row['rows']} x {row['tokens']}",
            format_seconds(row["audit_cpu_s"]),
        )
        for row in newest("audit_cost")[0]
    )
    return _table("model | loss | rows x tokens | the audit takes", rows, "audit_cost", where)


def _operators(where: str) -> str:
    found = newest("operator_database")[0]
    samples = found["samples"]
    told = [f"{row['sample']}: {row['reason'] or row['status']}" for row in found["reasons"]]
    row = (
        found["operators"],
        found["kinds_recomputed"],
        samples.get("equal", 0),
        samples.get("differs", 0),
        samples.get("raises", 0),
        samples.get("no step", 0),
        ", ".join(f"`{name}`" for name in told) or "none",
    )
    head = (
        "operators | kinds of ops recomputed | samples bitwise equal | different | raising where the plain "
        "step does not | where the plain step raises | without a judgement"
    )
    return _table(head, [row], "operator_database", where)


def _faults(where: str) -> str:
    found = newest("faults")[0]
    rows = ((row["fault"], f"{row['cases']:,}", _counts(row["counts"]), len(row["wrong"])) for row in found)
    return _table("what | cases | of which | promises broken", rows, "faults", where)


def _counts(counts: dict[str, float]) -> str:
    """What was counted, in a cell of a table."""
    told = []
    for name, count in counts.items():
        if name.endswith("_bytes"):
            told.append(f"{name.removesuffix('_bytes')}: {format_bytes(round(count))}")
        elif name.endswith("_s"):
            told.append(f"{name.removesuffix('_s')}: {format_seconds(count)}")
        else:
            told.append(f"{'exit code ' * name.isdecimal()}{name}: {count:,}")
    return ", ".join(told)


def _zoo(where: str) -> str:
    head = (
        "models | judged | planned and run | runs | any bit differs | first prediction too low | above the "
        "budget after the first step saw that | first prediction over measured peak: lowest, median, highest"
    )
    return _table(head, zoo_tables.kinds(), "zoo", where)


def _zoo_unplanned(where: str) -> str:
    return _table(
        "models | what became of them | in the words of the error", zoo_tables.unplanned(), "zoo", where
    )


def _zoo_low(where: str) -> str:
    head = "model | from | first prediction over measured peak, at each budget"
    return _table(head, zoo_tables.low(), "zoo", where)


def _zoo_hard(where: str) -> str:
    head = (
        "model | what became of it | recomputed at most, of the forward | first prediction over measured peak"
    )
    return _table(head, zoo_tables.hard(), "zoo", where)


def _zoo_names(where: str) -> str:
    return zoo_tables.names()


def _peers(where: str) -> str:
    head = (
        "model | budgets in which a peer fits | memfit's extra CPU time over the best peer's: median | "
        "highest | by counted operators: median | highest | above the budget | other gradients | predicted "
        "over measured peak | commit"
    )
    return _table(head, peer_tables.against(), "peers", where)


def _peers_reach(where: str) -> str:
    head = (
        "model | plain peak | least peak of a peer | least of memfit | a memory | largest batch of a peer "
        "in it | of memfit"
    )
    return _table(head, peer_tables.reach(), "peers", where)


def _peers_budgets(where: str) -> str:
    head = "model | memory | best peer that fits | its extra CPU time | memfit's"
    return _table(head, peer_tables.every_budget(), "peers", where)


def _peers_registry(where: str) -> str:
    rows = [
        (row["name"], row["version"], "works" if row["works"] else f"`{row['said'][:160]}`")
        for row in newest("peers_registry")[0]
    ]
    return _table("package | version | a chain of six blocks on this machine", rows, "peers_registry", where)


def _peers_compiler(where: str) -> str:
    rows = newest("peers_compiler")[0]
    plain_s = rows[0]["cpu_s"]
    table = [
        (
            "the plain eager step" if row["peer"] == "plain" else row["name"],
            format_bytes(row["peak_bytes"]) if "peak_bytes" in row else f"`{row['said'][:120]}`",
            f"{row['cpu_s'] / plain_s - 1:+.1%}" if "cpu_s" in row else "-",
        )
        for row in rows
    ]
    head = "`activation_memory_budget` | measured peak | CPU time of a step, over the plain one's"
    return _table(head, table, "peers_compiler", where)


_TABLES: dict[str, Callable[[str], str]] = {
    "traps": _traps,
    "coupled": _coupled,
    "bfloat16": _bfloat16,
    "parts": _parts,
    "wide": _wide,
    "recomputing": _recomputing,
    "rivals": _rivals,
    "large": _large,
    "heads": _heads,
    "audit": _audit,
    "faults": _faults,
    "operators": _operators,
    "peers": _peers,
    "peers_reach": _peers_reach,
    "peers_compiler": _peers_compiler,
    "peers_registry": _peers_registry,
    "peers_budgets": _peers_budgets,
    "zoo": _zoo,
    "zoo_unplanned": _zoo_unplanned,
    "zoo_low": _zoo_low,
    "zoo_hard": _zoo_hard,
    "zoo_names": _zoo_names,
}
