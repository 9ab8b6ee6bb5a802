"""Checkpointed blocks: bitwise the plain step, fewer bytes, and no trace once undone."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import random
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

import memfit
from memfit import UnsupportedModel
from memfit.runtime.meter import PeakMeter
from memfit.workloads.images import ResNet
from models import ZOO, LossFn, ZooCase, assert_same, outcome_of

WIDTH = 6


def built(name: str, scale: int = 1) -> tuple[Any, ZooCase]:
    """A model of the zoo in training mode, without a cache."""
    torch.manual_seed(3)
    model: Any = ZOO[name].build(scale).train()
    if hasattr(model, "config"):
        model.config.use_cache = False
    return model, ZOO[name]


def assert_step_is_plain(model: nn.Module, loss_fn: LossFn, batch: Any, **options: Any) -> tuple[str, ...]:
    """Two steps of a copy that is checkpointed are bitwise those of the model; returns what was wrapped."""
    wrapped = copy.deepcopy(model)
    handle = memfit.apply_gradient_checkpointing(wrapped, **options)
    outcomes = []
    for each in (model, wrapped):
        torch.manual_seed(7), random.seed(7), np.random.seed(7)
        for _ in range(2):  # the second adds to gradients, and starts from the buffers of the first
            loss = loss_fn(each, batch)
            loss.backward()
        outcomes.append((outcome_of(each, loss), random.random(), np.random.random()))
    assert_same(outcomes[0][0], outcomes[1][0])
    assert outcomes[0][1:] == outcomes[1][1:]
    return handle.blocks


ZOO_BLOCKS = {
    "gpt2": ("transformer.h.0", "transformer.h.1"),
    "llama": ("model.layers.0", "model.layers.1"),
    "bert": ("bert.encoder.layer.0", "bert.encoder.layer.1"),
    "vit": ("vit.layers.0", "vit.layers.1"),
    "resnet": tuple(f"resnet.encoder.stages.{stage}.layers.{layer}" for stage in (0, 1) for layer in (0, 1)),
    "encoder": ("1", "2"),
}


@pytest.mark.parametrize("name", ZOO_BLOCKS)
def test_a_step_of_the_zoo_is_bitwise_the_plain_one(name: str) -> None:
    model, zoo = built(name)
    assert assert_step_is_plain(model, zoo.loss, zoo.batch(4, 1)) == ZOO_BLOCKS[name]


def test_both_lists_of_an_encoder_decoder_are_found() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(  # type: ignore[call-arg,unused-ignore]
        vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=3, num_heads=2,
        use_cache=False, decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    ids = torch.randint(1, 50, (3, 8))
    model: Any = T5ForConditionalGeneration(config).train()
    blocks = assert_step_is_plain(model, lambda m, b: m(input_ids=b, labels=b).loss, ids)
    assert blocks == ("encoder.block.0", "encoder.block.1", *(f"decoder.block.{i}" for i in range(3)))


def test_the_stages_of_a_vision_model_are_taken_apart() -> None:
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[1, 2], num_heads=[1, 2], window_size=4
    )
    blocks = memfit.apply_gradient_checkpointing(SwinForImageClassification(config)).blocks
    assert [name.split("layers.", 1)[1] for name in blocks] == ["0", "1.blocks.0", "1.blocks.1"]


def test_blocks_of_experts_stay_whole() -> None:
    def expert() -> nn.Module:
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU())

    class Mixture(nn.Module):
        def __init__(self, experts: int) -> None:
            super().__init__()
            self.experts = nn.ModuleList(expert() for _ in range(experts))

    model = nn.ModuleDict({"layers": nn.ModuleList([Mixture(2), Mixture(4), Mixture(4)])})
    assert memfit.apply_gradient_checkpointing(model).blocks == ("layers.0", "layers.1", "layers.2")


def test_a_list_beside_repeated_blocks_is_found_too() -> None:
    def block() -> nn.Module:
        return nn.TransformerEncoderLayer(8, 2, 8)

    down = nn.ModuleList(
        [block(), block(), nn.Sequential(nn.Linear(8, 8), nn.ModuleList([Failing(), Failing()]))]
    )
    model = nn.ModuleDict({"down": down, "heads": nn.ModuleList([nn.ModuleList([block(), block()])])})
    found = memfit.apply_gradient_checkpointing(model).blocks
    assert found == ("down.0", "down.1", "down.2.1.0", "down.2.1.1", "heads.0.0", "heads.0.1")


def test_batch_norm_statistics_are_updated_once() -> None:
    torch.manual_seed(0)
    model = ResNet(classes=4, width=4).train()
    batch = (torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 3]))
    assert_step_is_plain(model, lambda m, b: F.cross_entropy(m(b[0]), b[1]), batch)
    counts = [b for name, b in model.named_buffers() if name.endswith("num_batches_tracked")]
    assert {int(count) for count in counts} == {2}


class Stateful(nn.Module):
    """A block whose output depends on what it writes: buffers of every kind, and randomness of the host."""

    mean: Tensor
    table: Tensor
    calls: Tensor
    late: Tensor | None
    twin: Any

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.lin = spectral_norm(nn.Linear(WIDTH, WIDTH)) if kind == "spectral" else nn.Linear(WIDTH, WIDTH)
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("table", torch.zeros(2, WIDTH))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("late", None)
        self.twin = nn.Module()
        self.twin.register_buffer("table", self.table)

    def forward(self, x: Tensor) -> Tensor:
        x = self.lin(x).sin()
        with torch.no_grad():
            if self.kind == "in place":
                self.calls += 1
                self.twin.table.add_(x.mean(0) * self.calls)
            elif self.kind == "rebound":
                self.table = self.table * 0.5 + x.mean(0)
            elif self.kind == "late":
                self.late = x.mean(0) if self.late is None else self.late * 0.5 + x.mean(0)
        if self.kind == "functional":
            x = x * self.mean.exp()
            x = F.batch_norm(x, self.mean, self.mean.new_ones(WIDTH), training=True, momentum=0.3)
        if self.kind == "host":
            x = x * random.random() * float(np.random.random())
        late = 0 if self.late is None else self.late
        out: Tensor = (x * (self.table.sum(0) + late + self.mean + 1)).exp().tanh()
        return out


class Chain(nn.Module):
    """Blocks in a row, each called twice."""

    layers: Any

    def __init__(self, make: Callable[[], nn.Module], number: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(make() for _ in range(number))

    def forward(self, x: Any) -> Any:
        for layer in [*self.layers, *self.layers]:
            x = layer(x)
        return x


def square_loss(model: Any, x: Tensor) -> Tensor:
    loss: Tensor = model(x).square().mean()
    return loss


@pytest.mark.parametrize("kind", ["spectral", "in place", "rebound", "late", "functional", "host"])
def test_the_recomputation_starts_where_the_forward_did(kind: str) -> None:
    torch.manual_seed(0)
    assert_step_is_plain(Chain(lambda: Stateful(kind)), square_loss, torch.randn(5, WIDTH))


def test_buffers_are_the_same_tensors_after_a_step() -> None:
    model = Chain(lambda: Stateful("in place"))
    before = dict(model.named_buffers())
    with memfit.apply_gradient_checkpointing(model):
        square_loss(model, torch.randn(5, WIDTH)).backward()
        assert all(buffer is before[name] for name, buffer in model.named_buffers())


def test_a_graph_can_be_run_backward_twice() -> None:
    model = Chain(lambda: Stateful("in place"))
    parameters = list(model.parameters())
    memfit.apply_gradient_checkpointing(model)
    loss = square_loss(model, torch.randn(5, WIDTH))
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    second = torch.autograd.grad(loss, parameters)
    assert all(map(torch.equal, first, second))


class Nested(nn.Module):
    """A block of nested arguments that grows a list of its caller and hides an output in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(WIDTH, WIDTH)
        self.drop = nn.Dropout(0.3)

    def forward(self, state: dict[str, Any], /, *, scales: list[Tensor], flag: str = "sin") -> Any:
        x = getattr(self.drop(self.lin(state["x"])), flag)() * scales[0].exp()
        scales.append(x.mean() * scales[-1].sin())
        return {"x": x, "extra": (x.sum(), None, [x * 2])}


class NestedModel(nn.Module):
    """Feeds nested blocks."""

    layers: Any

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Nested() for _ in range(3))
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        state: dict[str, Any] = {"x": x}
        scales = [self.scale * 1.5]
        for layer in self.layers:
            state = layer(state, scales=scales, flag="cos")
        assert len(scales) == 4
        return torch.stack([state["x"].sum(), state["extra"][2][0].mean(), *(s.mean() for s in scales)])


def test_arguments_and_outputs_of_any_nesting_pass() -> None:
    torch.manual_seed(0)
    assert_step_is_plain(NestedModel(), square_loss, torch.randn(4, WIDTH))


def test_an_argument_overwritten_after_the_block_is_an_error() -> None:
    class Overwriting(NestedModel):
        def forward(self, x: Tensor) -> Tensor:
            scale = self.scale * 1.5
            out = self.layers[0]({"x": x}, scales=[scale])["x"]
            scale.mul_(2)
            product: Tensor = out * scale
            return product

    model = Overwriting()
    memfit.apply_gradient_checkpointing(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square_loss(model, torch.randn(4, WIDTH)).backward()


def test_a_parameter_written_before_the_backward_is_an_error() -> None:
    model = NestedModel()
    memfit.apply_gradient_checkpointing(model)
    loss = square_loss(model, torch.randn(4, WIDTH))
    with torch.no_grad():
        model.layers[0].lin.bias.add_(1)
    with pytest.raises(RuntimeError, match=r"'lin\.bias' of a checkpointed Nested was written"):
        loss.backward()


def test_several_forwards_before_their_backwards_are_exact() -> None:
    torch.manual_seed(0)

    def loss_fn(model: Any, x: Tensor) -> Tensor:
        return square_loss(model, x) + square_loss(model, x * 2)

    assert_step_is_plain(Chain(lambda: Stateful("in place")), loss_fn, torch.randn(5, WIDTH))


def test_autocast_is_repeated() -> None:
    torch.manual_seed(0)
    model, zoo = built("bert")

    def loss_fn(model: Any, batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return zoo.loss(model, batch)

    assert_step_is_plain(model, loss_fn, zoo.batch(2, 1))


# ---- memory ------------------------------------------------------------------------------------------


def peak_bytes(model: nn.Module, zoo: ZooCase, batch: Any) -> int:
    zoo.loss(model, batch).backward()
    with PeakMeter("cpu") as meter:
        zoo.loss(model, batch).backward()
    return meter.peak_bytes


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_a_step_takes_fewer_bytes_and_every_second_block_lies_between(name: str) -> None:
    torch.manual_seed(0)
    model, zoo = built(name, scale=2)  # four blocks
    batch = zoo.batch(4, 2)
    plain = peak_bytes(model, zoo, batch)
    with memfit.apply_gradient_checkpointing(model, every=2) as handle:
        half = peak_bytes(model, zoo, batch)
        assert [block[-2:] for block in handle.blocks] == [".0", ".2"]
    with memfit.apply_gradient_checkpointing(model):
        least = peak_bytes(model, zoo, batch)
    assert least < half < plain
    assert peak_bytes(model, zoo, batch) == plain


def test_no_graph_or_no_training_means_no_checkpoint() -> None:
    runs = 0

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            nonlocal runs
            runs += 1
            out: Tensor = self.lin(x).sin()
            return out

    model = Chain(Counting)
    memfit.apply_gradient_checkpointing(model)

    def step() -> int:
        nonlocal runs
        runs = 0
        loss = square_loss(model, torch.randn(2, WIDTH))
        if loss.requires_grad:
            loss.backward()
        return runs

    assert step() == 8
    with torch.no_grad():
        assert step() == 4
    model.eval()
    assert step() == 4


def test_a_model_that_was_let_go_is_freed_at_once() -> None:
    model = Chain(Nested)
    memfit.apply_gradient_checkpointing(model)
    gone = weakref.ref(model.layers[0])
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


# ---- no trace ----------------------------------------------------------------------------------------


def traces(model: nn.Module) -> list[Any]:
    """Everything of a model that could tell that it was wrapped."""
    modules = dict(model.named_modules())
    return [
        list(modules), list(model.state_dict()), repr(model),
        [(id(module), type(module), dict(vars(module))) for module in modules.values()],
        [inspect.signature(module.forward) for module in modules.values()],
    ]  # fmt: skip


def without_types(found: list[Any]) -> list[Any]:
    names, keys, shown, modules, signatures = found
    return [names, keys, shown, [(module, held) for module, _, held in modules], signatures]


def test_nothing_but_the_class_of_the_blocks_changes_and_the_undo_is_exact() -> None:
    model, zoo = built("gpt2")
    model.transformer.h[0].register_forward_hook(lambda *_: None)
    before = traces(model)
    handle = memfit.apply_gradient_checkpointing(model)
    assert without_types(traces(model)) == without_types(before)
    assert traces(model) != before
    zoo.loss(model, zoo.batch(2, 1)).backward()
    handle.remove()
    assert traces(model) == before
    handle.remove()
    assert traces(model) == before


class Failing(nn.Module):
    """Fails when told so, after it has written a buffer."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("calls", torch.zeros(()))
        self.fails_at = -1

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if int(self.calls) == self.fails_at:
            raise KeyError("the block fails")
        out: Tensor = self.lin(x).sin()
        return out


def test_an_exception_in_a_forward_leaves_no_trace() -> None:
    model = Chain(Failing)
    before = traces(model)
    model.layers[1].fails_at = 1
    with pytest.raises(KeyError, match="the block fails"), memfit.apply_gradient_checkpointing(model):
        square_loss(model, torch.randn(2, WIDTH))
    model.layers[1].fails_at = -1
    assert traces(model) == before


def test_an_exception_in_a_recomputation_puts_buffers_and_random_numbers_back() -> None:
    model = Chain(Failing)
    with memfit.apply_gradient_checkpointing(model):
        loss = square_loss(model, torch.randn(2, WIDTH))
        buffers, contents = dict(model.named_buffers()), [int(b) for b in model.buffers()]
        model.layers[1].fails_at = 2
        streams = torch.get_rng_state(), random.getstate()
        with pytest.raises(KeyError, match="the block fails"):
            loss.backward()
        assert all(b is buffers[name] for name, b in model.named_buffers())
        assert [int(b) for b in model.buffers()] == contents
        assert torch.equal(streams[0], torch.get_rng_state())
        assert streams[1] == random.getstate()


def pickled(protocol: int) -> Callable[[Any], Any]:
    return lambda model: pickle.loads(pickle.dumps(model, protocol))


@pytest.mark.parametrize("copied", [copy.deepcopy, *map(pickled, range(pickle.HIGHEST_PROTOCOL + 1))])
def test_a_copy_or_a_pickle_is_a_plain_model_of_its_own(copied: Callable[[Any], Any]) -> None:
    model = nn.Sequential(*(nn.TransformerEncoderLayer(8, 2, 8) for _ in range(2)))
    memfit.apply_gradient_checkpointing(model)
    twin = copied(model)
    assert [type(layer) for layer in twin] == [nn.TransformerEncoderLayer] * 2
    square_loss(twin, torch.randn(3, 2, 8)).backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None for p in twin.parameters())
    memfit.apply_gradient_checkpointing(twin)


def test_hooks_of_a_block_run_once() -> None:
    calls: list[str] = []
    model = Chain(Failing)
    model.layers[0].register_forward_pre_hook(lambda *_: calls.append("before"))
    model.layers[0].register_forward_hook(lambda *_: calls.append("after"))
    model.layers[0].register_full_backward_hook(lambda *_: calls.append("backward"))
    memfit.apply_gradient_checkpointing(model)
    x = torch.randn(2, WIDTH, requires_grad=True)
    square_loss(model, x).backward()
    assert calls == ["before", "after"] * 2 + ["backward"] * 2


# ---- refusals ----------------------------------------------------------------------------------------


def test_applying_twice_is_refused_until_it_is_undone() -> None:
    model = Chain(Failing)
    handle = memfit.apply_gradient_checkpointing(model)
    with pytest.raises(ValueError, match=r"'layers\.0' is checkpointed already: call remove\(\)"):
        memfit.apply_gradient_checkpointing(model)
    handle.remove()
    memfit.apply_gradient_checkpointing(model)


def test_a_model_that_transformers_checkpoints_is_refused() -> None:
    model, _ = built("bert")
    model.activation_checkpointing_enable()
    with pytest.raises(ValueError, match=r"is on in '.*' already: call model\.activation_check"):
        memfit.apply_gradient_checkpointing(model)
    model.activation_checkpointing_disable()
    memfit.apply_gradient_checkpointing(model)


def test_a_cache_is_refused_with_the_cure() -> None:
    model, zoo = built("gpt2")
    model.config.use_cache = True
    memfit.apply_gradient_checkpointing(model)
    batch = zoo.batch(2, 1)
    with pytest.raises(UnsupportedModel, match=r"GPT2Block was given a DynamicCache.*with use_cache=False"):
        zoo.loss(model, batch)
    model.eval()
    zoo.loss(model, batch)
    model.train()
    model(**batch, use_cache=False).loss.backward()


def blocks_of(model: Chain) -> Iterator[tuple[Any, tuple[str, ...]]]:
    yield ["layers"], ("layers.0", "layers.1", "layers.2")
    yield ["layers.1"], ("layers.1",)
    yield [model.layers], ("layers.0", "layers.1", "layers.2")
    yield [model.layers[2], "layers.0"], ("layers.2", "layers.0")
    yield ["layers.1.lin", "layers.1.lin"], ("layers.1.lin",)


def test_blocks_may_be_named() -> None:
    model = Chain(Failing, 3)
    for asked, expected in blocks_of(model):
        with memfit.apply_gradient_checkpointing(model, blocks=asked) as handle:
            assert handle.blocks == expected
    assert_step_is_plain(model, square_loss, torch.randn(2, WIDTH), blocks=["layers.1", "layers.2"])


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"blocks": ["layer"]}, ValueError, "no module 'layer': did you mean 'layers'"),
        ({"blocks": ["layers", "nothing"]}, ValueError, "no module 'nothing'$"),
        ({"blocks": [nn.ReLU()]}, ValueError, "a ReLU that is not part of the model"),
        ({"blocks": []}, ValueError, "blocks holds no block"),
        ({"blocks": "layers"}, TypeError, "blocks is a str: give a list"),
        ({"blocks": [3]}, TypeError, "blocks holds a int"),
        ({"blocks": ["layers.0", "layers.0.lin"]}, ValueError, r"'layers\.0\.lin' is inside 'layers\.0'"),
        ({"blocks": ["", "layers.0"]}, ValueError, r"'layers\.0' is inside 'the model'"),
        ({"every": 0}, ValueError, "every is 0"),
        ({"every": 1.5}, TypeError, r"every is 1\.5"),
        ({"every": True}, TypeError, "every is True"),
    ],
)
def test_wrong_arguments_are_refused_by_name(options: Any, error: type[Exception], words: str) -> None:
    model = Chain(Failing)
    before = traces(model)
    with pytest.raises(error, match=words):
        memfit.apply_gradient_checkpointing(model, **options)
    assert traces(model) == before


def test_a_model_without_blocks_and_things_that_are_no_model_are_refused() -> None:
    with pytest.raises(ValueError, match="Sequential has no list of repeated blocks"):
        memfit.apply_gradient_checkpointing(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)))
    with pytest.raises(TypeError, match="model is a list"):
        memfit.apply_gradient_checkpointing([nn.Linear(2, 2)])  # type: ignore[arg-type]


def test_blocks_that_cannot_be_wrapped_are_refused() -> None:
    patched = Chain(Failing)
    patched.layers[1].forward = lambda x: x
    lazy = Chain(lambda: nn.LazyLinear(WIDTH))
    lists = Chain(lambda: nn.ModuleList([nn.Linear(2, 2)]))
    for model, words in (
        (patched, r"'layers\.1' \(Failing\) has a forward of its own"),
        (lazy, r"'layers\.0' \(LazyLinear\) has no parameters yet"),
        (lists, r"'layers\.0' \(ModuleList\) is a list"),
    ):
        with pytest.raises(UnsupportedModel, match=words):
            memfit.apply_gradient_checkpointing(model, blocks=["layers"])
        assert not any("_memfit_plain" in vars(type(module)) for module in model.modules())


def test_an_undo_over_a_later_change_of_class_is_refused() -> None:
    model = Chain(Failing)
    handle = memfit.apply_gradient_checkpointing(model)
    ours = type(model.layers[1])
    model.layers[1].__class__ = type("Sharded", (ours,), {})
    with pytest.raises(RuntimeError, match=r"'layers\.1' is a .*Sharded.* undo that first"):
        handle.remove()
    assert isinstance(model.layers[0], ours)
    model.layers[1].__class__ = ours
    handle.remove()
    assert {type(layer) for layer in model.layers} == {Failing}


def test_fit_takes_a_checkpointed_model_as_it_is() -> None:
    model, zoo = built("bert")
    batch = zoo.batch(4, 1)
    wrapped = copy.deepcopy(model)
    memfit.apply_gradient_checkpointing(wrapped)
    step = memfit.fit(wrapped, zoo.loss, batch, memory="1GiB", micro_batch_size=4)
    torch.manual_seed(5)
    loss = step(batch)
    torch.manual_seed(5)
    plain = zoo.loss(model, batch)
    plain.backward()
    assert_same(outcome_of(model, plain), outcome_of(wrapped, loss))


def test_torch_alone_would_update_the_statistics_twice() -> None:
    norm = nn.BatchNorm1d(WIDTH)
    checkpoint(norm, torch.randn(4, WIDTH), use_reentrant=False).sum().backward()
    assert norm.num_batches_tracked is not None
    assert int(norm.num_batches_tracked) == 2  # the day this fails, the swap of buffers can go
