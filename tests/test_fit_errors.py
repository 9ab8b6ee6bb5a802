"""Bad input of fit: each error says what, who and the cure, and carries its numbers."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import memfit
from memfit.errors import InexactAccumulation, InfeasibleBudget, MemfitError, UnsupportedModel

ROWS, WIDTH = 8, 16


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(2)


def model() -> nn.Module:
    """Two layers."""
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1))


def batch() -> dict[str, Tensor]:
    """A good batch."""
    return {"x": torch.randn(ROWS, WIDTH), "y": torch.randn(ROWS, 1)}


def loss(m: Any, b: Any) -> Tensor:
    """A mean over rows."""
    return F.mse_loss(m(b["x"]), b["y"])


def fit(**changes: Any) -> memfit.Step:
    """Fits with one thing changed."""
    given: dict[str, Any] = {"model": model(), "loss_fn": loss, "batch": batch(), "memory": "1GiB"}
    given |= changes
    return memfit.fit(given.pop("model"), given.pop("loss_fn"), given.pop("batch"), **given)


def test_the_good_input_is_accepted() -> None:
    assert fit()(batch()).shape == ()


# ---- memory --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("memory", "text"),
    [
        ("12Gb", "bits"),
        ("lots", "lots"),
        ("", "''"),
        ("0GiB", "0"),
        (0, "0"),
        (-1, "-1"),
        ("-2GiB", "-2GiB"),
        ("12 apples", "apples"),
    ],
)
def test_memory_that_cannot_be_read_is_refused(memory: str | int, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        fit(memory=memory)


@pytest.mark.parametrize("memory", [1.5, True, b"1GiB", [1]])
def test_memory_of_another_type_is_refused(memory: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"memory|bytes|GiB"):
        fit(memory=memory)


def test_memory_must_be_said_on_a_cpu() -> None:
    with pytest.raises(ValueError, match=r"say how much memory .* memory='8GiB'"):
        fit(memory=None)


def test_a_budget_below_the_parameters_names_what_is_needed_and_who_holds_it() -> None:
    with pytest.raises(InfeasibleBudget, match=r"no plan fits 100 B.*Raise the memory by") as caught:
        fit(memory=100)
    error = caught.value
    assert error.budget_bytes == 100
    assert error.owner in str(error)
    assert f"{error.needed_bytes:,} B" in str(error)
    held = sum(p.nbytes for p in model().parameters())
    assert error.needed_bytes > 2 * held


@pytest.mark.parametrize("micro_batch_size", [None, ROWS])
def test_a_refusal_is_tight(micro_batch_size: int | None) -> None:
    with pytest.raises(InfeasibleBudget) as caught:
        fit(memory=1, micro_batch_size=micro_batch_size)
    needed = caught.value.needed_bytes
    assert fit(memory=needed, micro_batch_size=micro_batch_size).plan.predicted_peak_bytes <= needed
    with pytest.raises(InfeasibleBudget):
        fit(memory=needed - 1, micro_batch_size=micro_batch_size)


def test_every_designed_error_is_a_memfit_error() -> None:
    with pytest.raises(MemfitError):
        fit(memory=1)


# ---- the batch -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("empty", [{}, [], (), None, 3, {"name": "text"}, {"x": torch.tensor(1.0)}])
def test_a_batch_without_rows_is_refused(empty: Any) -> None:
    with pytest.raises(ValueError, match=r"batch .* holds no tensor with rows"):
        fit(batch=empty)


def test_a_batch_of_no_rows_is_refused() -> None:
    with pytest.raises(ValueError, match=r"batch\['x'\] has 0 rows: leave empty batches out"):
        fit(batch={"x": torch.randn(0, WIDTH), "y": torch.randn(0, 1)})


def test_a_step_refuses_an_empty_batch_too() -> None:
    step = fit()
    with pytest.raises(ValueError, match="0 rows"):
        step({"x": torch.randn(0, WIDTH), "y": torch.randn(0, 1)})


def test_rows_that_disagree_name_the_odd_leaf() -> None:
    odd = {"x": torch.randn(ROWS, WIDTH), "y": torch.randn(ROWS, 1), "z": torch.randn(3)}
    with pytest.raises(
        InexactAccumulation, match=r"batch\['z'\] has 3 rows where .* 8.*close over it"
    ) as caught:
        fit(batch=odd)
    assert caught.value.owner == "batch['z']"


def test_a_leaf_that_cannot_be_split_is_named_when_splitting_is_asked_for() -> None:
    odd = batch() | {"other": object()}
    with pytest.raises(InexactAccumulation, match=r"batch\['other'\].*close over it") as caught:
        fit(batch=odd, micro_batch_size=2, count="rows")
    assert caught.value.owner == "batch['other']"


# ---- the loss --------------------------------------------------------------------------------------------


BAD_LOSSES: list[tuple[Callable[[Any, Any], Any], type[Exception], str]] = [
    (lambda m, b: m(b["x"]), ValueError, r"shape \(.*, 1\), not one number: reduce it"),
    (lambda m, b: loss(m, b).item(), TypeError, r"returned a float, not a tensor: return the scalar loss"),
    (lambda m, b: (loss(m, b), 1), TypeError, r"returned a tuple, not a tensor"),
    (lambda m, b: None, TypeError, r"returned a NoneType, not a tensor"),
    (lambda m, b: loss(m, b).detach(), ValueError, r"the loss has no graph.*Do not call \.detach"),
    (lambda m, b: b["x"].mean(), ValueError, r"the loss has no graph"),
]


@pytest.mark.parametrize(("loss_fn", "kind", "text"), BAD_LOSSES)
@pytest.mark.parametrize("count", ["auto", "rows"])
def test_a_loss_that_is_no_scalar_with_a_graph_is_refused(
    loss_fn: Any, kind: type[Exception], text: str, count: str
) -> None:
    with pytest.raises(kind, match=text):
        fit(loss_fn=loss_fn, count=count)


def test_an_error_of_the_loss_itself_reaches_the_user() -> None:
    def broken(m: Any, b: Any) -> Tensor:
        raise LookupError("no such column")

    with pytest.raises(LookupError, match="no such column"):
        fit(loss_fn=broken)


# ---- count and micro_batch_size --------------------------------------------------------------------------


def test_an_unknown_count_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"count is 'tokens': give 'auto', 'coupled', 'rows', 'labels'"):
        fit(count="tokens")


def test_labels_that_are_not_there_cannot_be_counted() -> None:
    step = fit(count="labels", micro_batch_size=2)
    with pytest.raises(InexactAccumulation, match=r"0 leaves called labels.*count= a function"):
        step(batch())


@pytest.mark.parametrize("count", [lambda part: -1, lambda part: float("nan"), lambda part: float("inf")])
def test_a_count_that_is_no_number_of_at_least_0_is_refused(count: Any) -> None:
    step = fit(count=count, micro_batch_size=2)
    with pytest.raises(ValueError, match="each must be a number of at least 0"):
        step(batch())


@pytest.mark.parametrize("size", [0, -1, ROWS + 1, True])
def test_a_micro_batch_size_outside_the_batch_is_refused(size: int) -> None:
    with pytest.raises(
        ValueError, match=rf"micro_batch_size is {size}, and the batch has 8 rows: give 1 to 8"
    ):
        fit(micro_batch_size=size)


@pytest.mark.parametrize("size", ["3", 2.5, 3.0, [2]])
def test_a_micro_batch_size_that_is_no_whole_number_is_refused(size: Any) -> None:
    text = f"micro_batch_size is {size!r}, a {type(size).__name__}: give a whole number of rows, 1 to 8"
    with pytest.raises(TypeError, match=re.escape(text)):
        fit(micro_batch_size=size)
    with pytest.raises(TypeError, match=re.escape(text)):
        memfit.profile(model(), loss, batch(), micro_batch_size=size)


@pytest.mark.parametrize("size", [0, -1, ROWS + 1, True])
def test_profile_refuses_the_same_micro_batch_sizes_as_fit(size: int) -> None:
    with pytest.raises(ValueError, match=rf"micro_batch_size is {size}, .* 8 rows: give 1 to 8"):
        memfit.profile(model(), loss, batch(), micro_batch_size=size)


def test_a_micro_batch_size_of_numpy_is_a_whole_number() -> None:
    assert fit(micro_batch_size=np.int64(3), count="rows").plan.micro_batch_size == 3


def two_terms(m: Any, b: Any) -> dict[str, Tensor]:
    """Two means over rows."""
    return {"fit": loss(m, b), "size": m(b["x"]).square().mean()}


NAMES = "'rows', 'labels', 'shifted_labels', 'sum' or a function"
BAD_COUNTS: list[tuple[Any, type[Exception], str]] = [
    (["rows"], TypeError, f"count is ['rows'], a list: give 'auto', 'coupled', {NAMES}"),
    (3, TypeError, f"count is 3, a int: give 'auto', 'coupled', {NAMES}"),
    (None, TypeError, f"count is None, a NoneType: give 'auto', 'coupled', {NAMES}"),
    ("row", ValueError, f"count is 'row': give 'auto', 'coupled', {NAMES}"),
    ({}, ValueError, "count is a mapping without any term: give {'name of a term': 'rows', ...}"),
    ({"fit": "rows", "size": 3}, TypeError, f"count of the term 'size' is 3, a int: give {NAMES}"),
    ({"fit": "rows", "size": ["rows"]}, TypeError, f"the term 'size' is ['rows'], a list: give {NAMES}"),
    ({"fit": "rows", "size": "auto"}, ValueError, f"count of the term 'size' is 'auto': give {NAMES}"),
    ({"fit": "rows", "size": "coupled"}, ValueError, f"the term 'size' is 'coupled': give {NAMES}"),
]


@pytest.mark.parametrize(("count", "kind", "text"), BAD_COUNTS, ids=[str(bad) for bad, *_ in BAD_COUNTS])
@pytest.mark.parametrize("size", [None, 2, ROWS])
def test_a_count_that_is_no_name_and_no_function_is_refused_before_anything_runs(
    count: Any, kind: type[Exception], text: str, size: int | None
) -> None:
    def never(m: Any, b: Any) -> Tensor:
        raise AssertionError("the loss was run")

    with pytest.raises(kind, match=re.escape(text)):
        fit(loss_fn=never, count=count, micro_batch_size=size)


def test_a_count_for_a_term_that_the_loss_lacks_names_it_before_any_gradient() -> None:
    net = model()
    counts = {"fit": "rows", "sise": "rows", "size": "rows"}
    step = fit(model=net, loss_fn=two_terms, count=counts, micro_batch_size=2)
    with pytest.raises(
        ValueError, match=r"names the term 'sise', .*\(it returned 'fit', 'size'\): leave it out"
    ):
        step(batch())
    assert all(p.grad is None or not p.grad.any() for p in net.parameters())


def test_a_term_without_a_count_is_named_at_the_first_split() -> None:
    step = fit(loss_fn=two_terms, count={"fit": "rows"}, micro_batch_size=2)
    with pytest.raises(ValueError, match=r"returned the term 'size', and count= has none .* give count="):
        step(batch())


def test_a_term_may_be_missing_from_a_micro_batch_in_which_it_counts_nothing() -> None:
    def sometimes(m: Any, b: Any) -> dict[str, Tensor]:
        chosen = b["y"][:, 0] > 0
        few = {"few": m(b["x"])[chosen].mean()} if chosen.any() else {}
        return {"fit": loss(m, b)} | few

    net, data = model(), {"x": torch.randn(ROWS, WIDTH), "y": torch.ones(ROWS, 1)}
    data["y"][2:] = -1.0
    counts = {"fit": "rows", "few": lambda part: (part["y"] > 0).sum()}
    step = fit(model=net, loss_fn=sometimes, batch=data, count=counts, micro_batch_size=2)
    assert torch.allclose(step(data), torch.stack([*sometimes(net, data).values()]).sum())


def test_a_term_whose_count_an_audit_found_may_end() -> None:
    has_ended = False

    def ending(m: Any, b: Any) -> dict[str, Tensor]:
        return {"fit": loss(m, b)} | ({} if has_ended else {"size": m(b["x"]).square().sum()})

    net, data = model(), batch()
    step = fit(model=net, loss_fn=ending, batch=data, micro_batch_size=2)
    assert step.audit is not None
    assert {name for name, _ in step.audit.terms} == {"fit", "size"}
    step(data)
    has_ended = True
    assert torch.allclose(step(data), loss(net, data))


def of_outputs(outputs: Any, b: Any) -> Tensor:
    """A mean over rows of outputs."""
    return F.mse_loss(outputs, b["y"])


@pytest.mark.parametrize("rows", [1, ROWS])
def test_two_passes_may_be_asked_for_where_the_batch_is_whole(rows: int) -> None:
    data = {name: tensor[:rows] for name, tensor in batch().items()}
    given = {"batch": data, "micro_batch_size": rows, "count": "coupled"}
    net = model()
    step = fit(model=net, loss_fn=of_outputs, outputs_fn=lambda m, b: m(b["x"]), **given)
    assert torch.allclose(step(data), loss(net, data))
    with pytest.raises(ValueError, match=r"count='coupled' needs outputs_fn="):
        fit(**given)


def test_a_coupled_loss_is_refused_when_it_would_have_to_be_split() -> None:
    def coupled(m: Any, b: Any) -> Tensor:
        out: Tensor = m(b["x"])
        return (out @ out.T).logsumexp(1).mean()

    with pytest.raises(
        InexactAccumulation, match=r"2 of 8 rows.*couples the rows.*leave micro_batch_size out"
    ):
        fit(loss_fn=coupled, micro_batch_size=2)
    assert fit(loss_fn=coupled).plan.gradient_accumulation_steps == 1


def test_a_hook_that_follows_every_accumulation_is_refused() -> None:
    net = model()
    handle = net[0].weight.register_post_accumulate_grad_hook(lambda p: None)  # type: ignore
    with pytest.raises(UnsupportedModel, match=r"'0.weight' has a hook.*step the optimizer after step"):
        fit(model=net)
    handle.remove()
    step = fit(model=net, micro_batch_size=2)
    net[0].weight.register_post_accumulate_grad_hook(lambda p: None)  # type: ignore
    with pytest.raises(UnsupportedModel, match=r"'0.weight' has a hook"):
        step(batch())


def test_a_forward_that_writes_to_a_parameter_is_refused_and_leaves_it_alone() -> None:
    class Decaying(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.weight.mul_(0.9)
            out: Tensor = super().forward(x)
            return out

    layer = Decaying(WIDTH, 1)
    net, before = nn.Sequential(layer), layer.weight.detach().clone()
    with pytest.raises(UnsupportedModel, match=r"writes to the parameter '0.weight'"):
        fit(model=net, count="rows")
    assert torch.equal(before, layer.weight)


@pytest.mark.parametrize("how", ["data", "detach"])
def test_a_write_to_a_parameter_past_autograd_is_refused_and_undone(how: str) -> None:
    class Clipping(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            weight = self.weight.data if how == "data" else self.weight.detach()
            weight.clamp_(-0.01, 0.01)
            if x.sum().item() > 1e9:  # fakes cannot tell, so that the step is recorded really
                return x
            out: Tensor = super().forward(x)
            return out

    layer = Clipping(WIDTH, 1)
    net, before = nn.Sequential(layer), layer.weight.detach().clone()
    with pytest.raises(UnsupportedModel, match=r"writes to the parameter '0.weight'"):
        fit(model=net, count="rows")
    assert torch.equal(before, layer.weight)


def test_fitting_leaves_the_rows_that_an_embedding_renormalises_as_they_were() -> None:
    embedding = nn.Embedding(20, WIDTH, max_norm=0.1)
    net, before = nn.Sequential(embedding, nn.Linear(WIDTH, 1)), embedding.weight.detach().clone()
    ids = torch.arange(12).view(6, 2)
    step = memfit.fit(net, lambda m, b: m(b).square().mean(), ids, memory="1GiB", micro_batch_size=6)
    assert torch.equal(before, embedding.weight)
    step(ids)
    assert not torch.equal(before, embedding.weight)


def test_torch_func_in_the_loss_is_refused_with_the_cure() -> None:
    def penalised(m: Any, b: Any) -> Tensor:
        slope = torch.func.grad(lambda x: m(x).sum())(b["x"])
        penalty: Tensor = loss(m, b) + slope.square().mean()
        return penalty

    with pytest.raises(UnsupportedModel, match=r"torch.func.*torch.autograd.grad"):
        fit(loss_fn=penalised, count="rows")


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@pytest.mark.parametrize("part", [None, "1"])
def test_a_scripted_module_is_refused_with_the_cure(part: str | None) -> None:
    scripted = torch.jit.script(nn.Linear(4, 4))
    model = scripted if part is None else nn.Sequential(nn.Linear(4, 4), scripted)
    with pytest.raises(UnsupportedModel, match=r"before torch.jit.script") as caught:
        memfit.fit(model, lambda m, x: m(x).mean(), torch.randn(4, 4), memory="1GiB")
    assert caught.value.owner == (part or "model")


def weighted(m: Any, b: Any) -> Tensor:
    """A mean over the weights of classes, which no counter knows."""
    return F.cross_entropy(m(b["x"]), b["labels"], weight=torch.tensor([1.0, 5.0]))


@pytest.mark.parametrize("zero_head", [False, True], ids=["class weights", "class weights, all losses equal"])
def test_a_loss_whose_weights_are_not_known_is_not_split(zero_head: bool) -> None:
    net = nn.Linear(WIDTH, 2)
    if zero_head:
        nn.init.zeros_(net.weight)
        nn.init.zeros_(net.bias)
    data = {"x": torch.randn(ROWS, WIDTH), "labels": torch.arange(ROWS) % 2}
    with pytest.raises(InexactAccumulation, match=r"mean over counted units.*count=lambda part") as caught:
        fit(model=net, loss_fn=weighted, batch=data, micro_batch_size=2)
    assert caught.value.owner == "loss_fn"
    assert fit(model=net, loss_fn=weighted, batch=data).plan.gradient_accumulation_steps == 1


def test_counters_that_were_alike_in_the_example_and_are_not_later_are_refused_by_name() -> None:
    def flat(m: Any, b: Any) -> Tensor:
        return F.cross_entropy(m(b[0]), b[1])

    net, x, groups = nn.Linear(WIDTH, 3), torch.randn(ROWS, WIDTH), torch.arange(ROWS)
    classes = torch.arange(ROWS) % 3
    step = fit(model=net, loss_fn=flat, batch=(x, classes, groups), micro_batch_size=2)
    step((x, classes.flip(0), groups))
    classes[1] = -100
    with pytest.raises(
        InexactAccumulation, match=r"over rows or over entries of batch\[1\] that are not -100: .* count="
    ):
        step((x, classes, groups))
    assert fit(model=net, loss_fn=flat, batch=(x, classes, groups), micro_batch_size=ROWS)(
        (x, classes, groups)
    ).isfinite()


# ---- functions, scaler, profile and batch_norm -----------------------------------------------------------


@pytest.mark.parametrize("scaler", ["x", True, 1024.0, torch.amp.GradScaler])
def test_a_scaler_of_another_type_is_refused_by_fit(scaler: Any) -> None:
    with pytest.raises(TypeError, match=rf"scaler is a {type(scaler).__name__}: give a torch.amp.GradScaler"):
        fit(scaler=scaler)


@pytest.mark.parametrize("stored", [3, "profile.json", {}])
def test_a_profile_of_another_type_is_refused(stored: Any) -> None:
    with pytest.raises(TypeError, match=rf"profile is a {type(stored).__name__}: give a memfit.Profile"):
        fit(profile=stored)


@pytest.mark.parametrize("choice", ["x", None, ["exact"]])
def test_an_unknown_batch_norm_lists_the_known_ones(choice: Any) -> None:
    text = re.escape(f"batch_norm is {choice!r}: give 'exact', 'ghost', 'frozen'")
    with pytest.raises(ValueError, match=text):
        fit(batch_norm=choice)
    with pytest.raises(ValueError, match=text):
        memfit.profile(model(), loss, batch(), batch_norm=choice)


OF_MODEL = r"loss_fn is a int: give a function loss_fn\(model, batch\) -> scalar tensor"
OF_OUTPUTS = r"loss_fn is a int: give a function loss_fn\(outputs, batch\) -> scalar tensor"
OUTPUTS = r"outputs_fn is a int: give a function outputs_fn\(model, batch\) -> tensors of one row a row"
NO_FUNCTIONS: list[tuple[Callable[[], Any], str]] = [
    (lambda: fit(loss_fn=3), OF_MODEL),
    (lambda: memfit.profile(model(), cast(Any, 3), batch()), OF_MODEL),
    (lambda: memfit.audit(model(), cast(Any, 3), batch()), OF_MODEL),
    (lambda: fit(loss_fn=3, outputs_fn=lambda m, b: m(b["x"])), OF_OUTPUTS),
    (lambda: fit(outputs_fn=3), OUTPUTS),
    (lambda: memfit.profile(model(), loss, batch(), outputs_fn=cast(Any, 3)), OUTPUTS),
]


@pytest.mark.parametrize(("call", "text"), NO_FUNCTIONS)
def test_what_is_given_for_a_function_and_cannot_be_called_is_refused(
    call: Callable[[], Any], text: str
) -> None:
    with pytest.raises(TypeError, match=text):
        call()


NO_OUTPUTS: list[tuple[Callable[[Any, Any], Any], str]] = [
    (lambda m, b: None, "NoneType"),
    (lambda m, b: 3, "int"),
    (lambda m, b: ["a"], "list"),
    (lambda m, b: m(b["x"]).argmax(1), "Tensor"),
]


@pytest.mark.parametrize(("outputs_fn", "kind"), NO_OUTPUTS, ids=[kind for _, kind in NO_OUTPUTS])
@pytest.mark.parametrize("count", ["auto", "coupled"])
def test_outputs_without_any_tensor_that_has_a_gradient_are_refused(
    outputs_fn: Any, kind: str, count: str
) -> None:
    net = model()
    text = f"outputs_fn returned a {kind} without any tensor that a gradient can be taken of: return tensors"
    with pytest.raises(ValueError, match=rf"{text} .* one row a row of the batch"):
        fit(model=net, loss_fn=lambda o, b: net(b["x"]).exp().sum().log(), outputs_fn=outputs_fn, count=count)


# ---- the model -------------------------------------------------------------------------------------------


def test_a_model_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"Sequential has no parameter that requires a gradient.*requires_grad_\(\)"
    ):
        fit(model=model().requires_grad_(False))
    with pytest.raises(ValueError, match=r"Tanh has no parameter"):
        fit(model=nn.Tanh())


@pytest.mark.parametrize("given", [3, nn.Linear, loss])
def test_a_model_that_is_no_module_is_refused(given: Any) -> None:
    text = rf"model is a {type(given).__name__}: give a torch.nn.Module"
    for call in (memfit.profile, memfit.audit):
        with pytest.raises(TypeError, match=text):
            call(given, loss, batch())
    with pytest.raises(TypeError, match=text):
        fit(model=given)


def test_parameters_on_several_devices_are_named() -> None:
    split = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1, device="meta"))
    with pytest.raises(
        UnsupportedModel, match=r"'0\.\w+' is on cpu and '1\.\w+' on meta.*model\.to"
    ) as caught:
        fit(model=split)
    assert caught.value.owner.startswith("1.")


def compiled_model(where: str) -> tuple[nn.Module, nn.Module]:
    """A model that is compiled as a whole, and the module whose parameters are trained."""
    net = model()
    if where == "in place":
        net.compile(backend="eager")
    return (torch.compile(net, backend="eager") if where == "whole" else net), net  # type: ignore


@pytest.mark.parametrize("where", ["whole", "in place"])
def test_a_compiled_model_is_planned_as_opaque_and_says_so(where: str) -> None:
    (net, trained), data = compiled_model(where), batch()
    loss(net, data).backward()
    expected = [p.grad.clone() for p in trained.parameters() if p.grad is not None]
    trained.zero_grad()
    with pytest.warns(UserWarning, match=r"compiled by torch.compile.*_orig_mod"):
        step = fit(model=net, batch=data, micro_batch_size=ROWS)
    step(data)
    assert (step.plan.recomputes, "opaque" in step.profile.source) == (0, True)
    found = [p.grad for p in trained.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert step.verdict is not None
    assert step.verdict.held


def test_a_compiled_model_that_does_not_fit_is_refused() -> None:
    net, _ = compiled_model("whole")
    with pytest.warns(UserWarning, match="compiled"), pytest.raises(InfeasibleBudget) as refused:
        fit(model=net, memory=1000)
    assert refused.value.needed_bytes > 1000


def test_a_frozen_part_is_no_error() -> None:
    frozen = nn.Sequential(nn.Linear(WIDTH, WIDTH).requires_grad_(False), nn.Linear(WIDTH, 1))
    fit(model=frozen)(batch())
    assert [p.grad is None for p in frozen.parameters()] == [True, True, False, False]


def test_engines_that_memfit_cannot_wait_for_are_refused_with_the_one_to_use() -> None:
    parallel = nn.DataParallel(nn.Linear(4, 4))
    with pytest.raises(UnsupportedModel, match=r"'DataParallel' is a DataParallel.*DistributedDataParallel"):
        memfit.fit(parallel, lambda m, x: m(x).sum(), torch.randn(4, 4), memory="1GiB")
    inside = nn.Sequential(nn.DataParallel(nn.Linear(4, 4)))
    with pytest.raises(UnsupportedModel, match="'0' is a DataParallel") as refused:
        memfit.profile(inside, lambda m, x: m(x).sum(), torch.randn(4, 4))
    assert refused.value.owner == "0"
