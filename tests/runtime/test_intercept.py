"""What memfit is told of while a forward runs: every write, calls of planned ops, and nothing else."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from memfit.core.timeline import droppable
from memfit.runtime.intercept import PlannedOp, is_heard, listen, plan_for, told, unheard
from memfit.runtime.replay import Replayer, decisions_of
from models import CASES, WIDTH, ZOO, Net, assert_same, floats, keys, plans_of, recorded, square_loss
from models import step_outcome as outcome


class Listening:
    """Notes what it is told."""

    is_listening = True

    def __init__(self) -> None:
        self.writes: list[Tensor] = []
        self.ended = 0
        self.calls: list[str] = []
        self.types: dict[str, torch.dtype] = {}

    def begin_writes(self, tensors: list[Tensor]) -> int:
        self.writes += tensors
        return len(self.writes)

    def end_writes(self, begun: int) -> None:
        self.ended += 1

    def called(
        self, op: PlannedOp, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self.calls.append(str(op.func))
        self.types |= {str(op.func): item.dtype for item in args if isinstance(item, Tensor)}
        return call(*args, **kwargs)


def _same_storage(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _scripted(x: Tensor) -> object:
    compiled: Any = torch.jit.CompilationUnit("def write(x):\n    return x.add_(1.0)\n")
    return compiled.write(x)


WRITES: dict[str, Callable[[Tensor], object]] = {
    "in place": lambda x: x.add_(1.0),
    "through a view": lambda x: x[1:].t().zero_(),
    "through data": lambda x: x.data.mul_(2.0),
    "through detach": lambda x: x.detach().fill_(3.0),
    "by index": lambda x: x.__setitem__(torch.tensor([0, 2]), 7.0),
    "by out": lambda x: torch.sin(torch.ones(4, 4), out=x),
    "in a list": lambda x: torch._foreach_add_([x], 1.0),
    "in TorchScript": _scripted,
    "by a composite op": lambda x: torch.nn.functional.dropout(x, 0.5, inplace=True),
    "in inference mode": lambda x: _in_inference_mode(x),
    "undeclared": lambda x: torch.batch_norm(
        torch.randn(3, 4), None, None, x[0], torch.ones(4), True, 0.1, 1e-5, False
    ),
}


def _in_inference_mode(x: Tensor) -> None:
    with torch.inference_mode():
        x.add_(1.0)


@pytest.mark.parametrize("name", WRITES)
def test_a_write_is_told_however_it_is_made(name: str) -> None:
    listener, x = Listening(), torch.full((4, 4), 0.25)
    with told(listener, calls=False):
        WRITES[name](x)
    assert any(_same_storage(tensor, x) for tensor in listener.writes)
    assert listener.ended
    assert not torch.equal(x, torch.full((4, 4), 0.25))


def test_a_write_by_an_op_that_came_with_a_later_import_is_told() -> None:
    with told(Listening(), calls=False):  # looks for the ops there are
        pass
    library = torch.library.Library("memfit_test", "FRAGMENT")
    library.define("late_(Tensor(a!) x) -> ()")
    library.impl("late_", lambda x: None, "CPU")
    listener, x = Listening(), torch.zeros(3)
    with told(listener, calls=False):
        torch.ops.memfit_test.late_(x)
    assert any(_same_storage(tensor, x) for tensor in listener.writes)


def test_an_op_that_no_plan_names_is_not_told() -> None:
    plan_for([torch.ops.aten.erfinv.default])  # kernels stay, so ops that no other test plans
    listener, x = Listening(), torch.full((2,), 0.5)
    with told(listener, calls=True):
        x.digamma().view(2, 1).erfinv().lgamma()
        with unheard():
            x.erfinv()
        listen(False)
        x.erfinv()
    assert listener.calls == ["aten.erfinv.default"]
    assert listener.writes == []
    x.erfinv()
    assert listener.calls == ["aten.erfinv.default"]


def test_a_call_that_autocast_or_vmap_takes_is_told_once_as_the_kernel_sees_it() -> None:
    plan_for([torch.ops.aten.addbmm.default, torch.ops.aten.erfinv.default])
    listener, x = Listening(), torch.full((3, 2), 0.5)
    with told(listener, calls=True):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.addbmm(torch.ones(2, 2), torch.ones(3, 2, 2), torch.ones(3, 2, 2))
        mapped = torch.vmap(lambda row: row.erfinv() * 2)(x)
    assert listener.calls.count("aten.addbmm.default") == 1
    assert listener.types["aten.addbmm.default"] == torch.bfloat16
    assert torch.equal(mapped, x.erfinv() * 2)
    assert listener.calls.count("aten.erfinv.default") == 1


def test_what_attention_and_dropout_write_of_their_own_is_told_only_where_it_may_be_planned() -> None:
    x = torch.randn(1, 2, 4, 4)
    mask = torch.zeros(4, 4)
    for calls in (False, True):
        listener = Listening()
        with told(listener, calls=calls):
            torch.nn.functional.dropout(x, 0.5)
            torch.nn.functional.scaled_dot_product_attention(x, x, x, mask, dropout_p=0.5)
        assert bool(listener.writes) == calls
        assert not any(_same_storage(tensor, other) for tensor in listener.writes for other in (x, mask))


def test_another_thread_is_not_told_of() -> None:
    listener, x = Listening(), torch.zeros(2)
    with told(listener, calls=True):
        thread = threading.Thread(target=lambda: x.add_(1.0))
        thread.start()
        thread.join()
    assert listener.writes == []


def test_an_op_that_raises_leaves_the_keys_as_they_were() -> None:
    plan_for([torch.ops.aten.vdot.default])
    listener = Listening()
    with told(listener, calls=True):
        for _ in range(2):
            with pytest.raises(RuntimeError, match="same number of elements"):
                torch.vdot(torch.ones(2), torch.ones(3))
            with pytest.raises(RuntimeError, match="must match"):
                torch.zeros(2).add_(torch.ones(3))
        assert is_heard()
    assert listener.calls.count("aten.vdot.default") == 2
    assert listener.ended == len(listener.writes) == 2
    assert not is_heard()


# ---- what is heard is what was recorded ---------------------------------------------------------------


_KNOWN = {"dtype_views_and_complex": "aten.clone.default"}  # what resolves a conjugate is below autograd


def _unlike(model: nn.Module, loss_fn: Any, batch: Any, known: str = "") -> dict[Any, tuple[int, int]]:
    """Where everything is planned: kinds of calls that were recorded and heard unlike numbers of times."""
    graph = recorded(model, loss_fn, batch)
    plan = keys(graph, droppable(graph))
    kinds = {(key.frame, key.op) for key in plan}
    made = (graph.ops[op].key for op in range(graph.forward_ops))
    wanted = Counter((key.frame, key.op) for key in made if (key.frame, key.op) in kinds)
    heard: Counter[Any] = Counter()

    class Noting(Replayer):
        def called(self, op: Any, call: Any, args: Any, kwargs: Any) -> Any:
            heard[self._sites.current.name, str(op.func)] += 1
            try:
                return super().called(op, call, args, kwargs)
            finally:
                self._listen(True)  # to the end of the frame

    torch.manual_seed(11)  # as where it was recorded
    with Noting(model, decisions_of(plan)):
        loss_fn(model, batch)
    unlike = (kind for kind in kinds if wanted[kind] != heard[kind])
    return {kind: (wanted[kind], heard[kind]) for kind in unlike if kind[1] != known}


@pytest.mark.parametrize("name", CASES)
def test_every_planned_call_of_a_case_is_heard_once(name: str) -> None:
    case = CASES[name]
    assert _unlike(case.model(), case.loss, case.batch(), _KNOWN.get(name, "")) == {}


@pytest.mark.parametrize("name", ZOO)
def test_every_planned_call_of_a_model_is_heard_once(name: str) -> None:
    zoo = ZOO[name]
    assert _unlike(zoo.build(1).train(), zoo.loss, zoo.batch(4, 1)) == {}


def test_after_the_last_planned_call_of_a_frame_no_call_in_it_is_told() -> None:
    def body(m: Any, x: Tensor) -> Any:
        x = m.first((x * m.scale).sin().sin().cos()).sin()
        return m.second(x).sin()

    names: list[str] = []

    class Noting(Replayer):
        def called(self, op: Any, call: Any, args: Any, kwargs: Any) -> Any:
            names.append(f"{self._sites.current.name}: {op.func}")
            return super().called(op, call, args, kwargs)

    tanh = nn.Sequential(nn.Tanh(), nn.Tanh())
    model = Net(body, first=tanh, second=nn.Tanh(), scale=nn.Parameter(torch.ones(WIDTH)))
    graph = recorded(model, square_loss, floats())
    wanted = {("model", "aten.sin.default", 1), ("first.1", "aten.tanh.default", 0)}
    plan = [key for key in keys(graph, droppable(graph)) if key[:3] in wanted]
    with Noting(model, decisions_of(plan)):
        square_loss(model, floats())
    told_of = ["model: aten.sin.default", "model: aten.sin.default", "first.1: aten.tanh.default"]
    assert [name for name in names if "sin." in name or "tanh" in name] == told_of


# ---- what no recording has seen -----------------------------------------------------------------------


UNFORESEEN: dict[str, Callable[[Tensor], object]] = {
    "counted": lambda h: h.detach().mul_(0.5),
    "uncounted": lambda h: h.data.mul_(0.5),
    "of a part": lambda h: h.data[1:].add_(1.0),
}


@pytest.mark.parametrize("name", UNFORESEEN)
def test_a_write_that_the_recording_had_not_is_as_in_the_plain_step(name: str) -> None:
    def body(m: Any, x: Tensor) -> Any:
        h = m.lin(x) + 1.0  # saved by nobody, so that autograd minds none of the writes
        g = h + 2.0
        if x.sum() > 0:
            UNFORESEEN[name](h)
        return m.out((g * 3.0).sin() + (h + 4.0).cos())

    model = Net(body, lin=nn.Linear(WIDTH, WIDTH), out=nn.Linear(WIDTH, WIDTH))
    quiet, busy = -floats().abs(), floats().abs()
    graph = recorded(model, square_loss, quiet)
    for _, plan in plans_of(graph):
        assert_same(outcome(model, square_loss, busy), outcome(model, square_loss, busy, plan))


# ---- writes made inside torch's own layers ------------------------------------------------------------


def _reads_the_statistics_before(m: Any, x: Tensor) -> Any:
    h = x * m.norm.running_var  # a record holds what the norm is about to write
    return m.out(m.norm(h.sin()).cos())


def _normalises_by_old_statistics_first(m: Any, x: Tensor) -> Any:
    h = m.norm.eval()(x).sin()
    return m.out(m.norm.train()(h).cos())


def _reads_the_statistics_between(m: Any, x: Tensor) -> Any:
    h = m.norm(x)
    g = h.sin() * m.norm.running_mean
    return m.out(m.norm(g).cos())


@pytest.mark.parametrize(
    "body",
    [_reads_the_statistics_before, _normalises_by_old_statistics_first, _reads_the_statistics_between],
)
def test_statistics_that_a_record_holds_are_as_they_were_before_a_batch_norm_wrote_them(body: Any) -> None:
    model = Net(body, norm=nn.BatchNorm1d(WIDTH), out=nn.Linear(WIDTH, WIDTH))
    batch = floats()
    graph = recorded(model, square_loss, batch)
    plain = outcome(model, square_loss, batch)
    for _, plan in plans_of(graph):
        assert_same(plain, outcome(model, square_loss, batch, plan))
        outside = [key for key in plan if key.frame != "norm" and not key.frame.startswith("norm#")]
        assert_same(plain, outcome(model, square_loss, batch, outside))


def test_a_write_of_the_users_mode_inside_a_linear_layer_is_seen() -> None:
    class Scales(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is F.linear:
                x.data.mul_(0.5)
            return func(*args, **(kwargs or {}))

    x = torch.ones(2)

    def body(m: Any, batch: Tensor) -> Any:
        nonlocal x
        x = batch + 1.0
        g = x * 2.0
        with Scales():
            h = m.lin(batch)
        return m.out((g + 3.0).sin() + h + x.detach())

    model = Net(body, lin=nn.Linear(WIDTH, WIDTH), out=nn.Linear(WIDTH, WIDTH))
    batch = floats()
    plain = outcome(model, square_loss, batch)
    graph = recorded(model, square_loss, batch)
    for _, plan in plans_of(graph):
        outside = [key for key in plan if key.frame != "lin"]
        assert_same(plain, outcome(model, square_loss, batch, outside))
