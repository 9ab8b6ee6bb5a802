"""Laws of a plan in other tools' settings. TrainingArguments and a YAML parser are the judges."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from memfit.cli import main
from memfit.core.export import Export, equal_part, export
from memfit.core.graph import Level, ValueKey
from memfit.core.plan import Plan
from memfit.core.strategies import Strategy

KEY = ValueKey("layers.0", "aten.gelu.default", 0, 0)
PLAN = Plan(
    rows=32,
    micro_batch_size=8,
    gradient_accumulation_steps=4,
    budget_bytes=1 << 30,
    predicted_peak_bytes=1 << 29,
    peak_owner="forward, x",
    predicted_step_s=4.0,
    forward_s=1.0,
    recompute_s=0.2,
    lower_bound_s=0.2,
)
RECOMPUTES = dataclasses.replace(PLAN, recompute=(KEY,))


def every_block(peak_bytes: int, step_s: float) -> Strategy:
    return Strategy("every block", "every block", "layers", 8, 4, peak_bytes, step_s, 1.0, 0.9)


def training_arguments(keys: dict[str, Any], folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    with warnings.catch_warnings():
        # transformers 5's own: the old name, which 4 and 5 both take, is to go in 6.
        warnings.filterwarnings("ignore", r"`gradient_checkpointing(_kwargs)?` is deprecated", FutureWarning)
        return transformers.TrainingArguments(output_dir=str(folder), report_to=[], use_cpu=True, **keys)


@pytest.mark.parametrize("plan", [PLAN, RECOMPUTES], ids=["keeps", "recomputes"])
def test_training_arguments_take_the_keys_and_mean_the_plan(plan: Plan, tmp_path: Path) -> None:
    found = training_arguments(plan.to("transformers").keys, tmp_path)
    assert found.per_device_train_batch_size == 8
    assert found.gradient_accumulation_steps == 4
    assert bool(found.gradient_checkpointing) == bool(plan.recompute)


def test_pasted_arguments_are_the_keys() -> None:
    found = RECOMPUTES.to("transformers")
    assert eval(f"dict(\n{found}\n)") == found.keys


@pytest.mark.parametrize("plan", [PLAN, RECOMPUTES], ids=["keeps", "recomputes"])
def test_pasted_yaml_is_the_keys(plan: Plan) -> None:
    found = plan.to("axolotl")
    assert yaml.safe_load(str(found)) == found.keys
    assert found.keys["micro_batch_size"] == 8


@given(st.integers(1, 300).flatmap(lambda rows: st.tuples(st.just(rows), st.integers(1, rows))))
def test_the_effective_batch_stays_and_no_part_grows(drawn: tuple[int, int]) -> None:
    rows, size = drawn
    steps = -(-rows // size)
    plan = dataclasses.replace(PLAN, rows=rows, micro_batch_size=size, gradient_accumulation_steps=steps)
    found = plan.to("axolotl")
    part, parts = found.keys["micro_batch_size"], found.keys["gradient_accumulation_steps"]
    assert part * parts == rows
    assert part <= size
    assert all(rows % larger for larger in range(part + 1, size + 1))
    assert any("equal parts only" in sentence for sentence in found.not_expressed) == (part != size)
    assert any("num_items_in_batch" in sentence for sentence in found.not_expressed) == (parts > 1)


def test_what_is_lost_is_said() -> None:
    lost = " ".join(RECOMPUTES.to("transformers").not_expressed)
    assert "1 tensors" in lost
    assert "20.0% of a forward" in lost
    assert "does not know" in lost
    assert "levels" not in lost
    assert "two passes" not in lost
    deep = dataclasses.replace(RECOMPUTES, levels=(Level(1, 0),), is_two_pass=True)
    lost = " ".join(deep.to("transformers").not_expressed)
    assert "levels" in lost
    assert "ANOTHER LOSS" in lost


@pytest.mark.parametrize(("peak_bytes", "said"), [(1 << 29, "which fits"), (1 << 31, "which DOES NOT FIT")])
def test_the_nearest_setting_is_compared_where_it_is_known(peak_bytes: int, said: str) -> None:
    compared = [every_block(1 << 40, 9.0), every_block(peak_bytes, 5.0)]
    lost = " ".join(export(RECOMPUTES, "transformers", compared).not_expressed)
    assert said in lost
    assert "25.0% more than the plan" in lost
    assert "does not know" not in lost


def test_an_unknown_tool_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'keras'.*transformers and axolotl"):
        PLAN.to("keras")


def test_the_part_is_one_of_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "jobs:tiny", "--memory", "1GiB", "--export", "axolotl"]) == 0
    shown = capsys.readouterr().out
    assert main(["plan", "jobs:tiny", "--memory", "1GiB", "--export", "axolotl", "--json"]) == 0
    told = capsys.readouterr().out
    plan = Plan.from_json(told)
    assert yaml.safe_load(shown) == json.loads(told)["export"]["keys"]
    assert yaml.safe_load(shown)["micro_batch_size"] == equal_part(plan)
    assert main(["plan", "jobs:tiny", "--memory", "1GiB", "--export", "nothing"]) == 5
    assert "transformers and axolotl" in capsys.readouterr().err


def test_an_export_is_a_value() -> None:
    assert PLAN.to("axolotl") == export(PLAN, "axolotl")
    assert isinstance(PLAN.to("axolotl"), Export)
