"""A model that an audit may run: a copy in float64 where that works, and its gradients for spans of rows.

Note [Twin]
 1. The copy is in float64, and what the loss casts down stays there (``runtime/doubled.py``): the smallest
    real violation is far above its rounding. Where the loss does not run so, or the model cannot be copied or
    is too large, it is the model itself, in its own precision; if too large, with a sample of its parameters.
 2. Constant parameters of the copy are moved a little: a layer that starts at zero would hide the gradients
    of all before it.
 3. Every sequence starts from the same state and random streams, and leaves nothing: buffers, attributes of
    modules, gradients, generators, autocast. Hooks of parameters are not on the copy but judged apart.
 4. A gradient is a sample of coordinates of each parameter, scaled to the same norm, so that an error in a
    small parameter counts like one in a large one.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from memfit.runtime.batch import map_tensors, rows_of, split
from memfit.runtime.callsite import CallSites
from memfit.runtime.doubled import LOWER, Doubled
from memfit.runtime.draws import Draws, Span, Watch
from memfit.runtime.fake import untouched
from memfit.runtime.micro import LossFn, weighted_loss
from memfit.runtime.preserve import RandomStreams, Snapshot, no_gradients

_MOST_COORDINATES = 1_000_000
_LEAST_NORM = 1e-4  # of the largest parameter's gradient; below it a norm is that of rounding
_MOVED = 0.02  # of the value of a constant parameter
_SEED = 2024
_LOOK = 64


class Unrelated(ValueError):
    """The loss uses another model than the one it is given."""


class _Reentrant(Exception):
    """The reentrant variant of ``torch.utils.checkpoint`` knows ``loss.backward()`` only."""


class Twin:
    """A model with its loss and probe, ready to run spans of rows. See Note [Twin]."""

    def __init__(
        self, model: nn.Module, loss_fn: LossFn, probe: Any, names: frozenset[str], *, in_double: bool
    ) -> None:
        """Runs ``model`` as it is, which may be a copy; ``names`` are the parameters to look at."""
        self.model = model
        self.probe = probe
        self.rows = rows_of(probe)
        self.in_double = in_double
        self.draws = Draws(self.rows)
        self.host_random: list[str] = []
        self.parameters = {n: p for n, p in model.named_parameters() if n in names}
        self.whole: dict[str, Tensor] = {}
        self.buffers_after: dict[str, Tensor] = {}
        self.keep: frozenset[str] = frozenset()
        self.kept: dict[Span, dict[str, Tensor]] = {}
        self.losses: dict[Span, float] = {}
        self._loss_fn = loss_fn
        self._plain_backward = False
        self._streams = RandomStreams.now()
        self._coordinates: dict[str, Tensor] = {}
        self._scales: dict[str, float] = {}

    @property
    def tolerance(self) -> float:
        """A relative error below it is rounding."""
        return 1e-9 if self.in_double or self._precision() == torch.float64 else 1e-3

    @property
    def loss_tolerance(self) -> float:
        """A relative error of the loss below it is rounding, which is less than that of gradients."""
        return 10 * self.tolerance if self.tolerance < 1e-6 else 1e-5

    @property
    def is_precise(self) -> bool:
        """Whether the arithmetic can tell weights apart at all."""
        return self.in_double or self._precision() in (torch.float32, torch.float64)

    @property
    def has_gradient(self) -> bool:
        """Whether the whole probe has a finite gradient that is not zero."""
        norms = [float(gradient.norm()) for gradient in self.whole.values()]
        return all(math.isfinite(norm) for norm in norms) and any(norms)

    def _precision(self) -> torch.dtype:
        """The least precise type of the parameters."""
        types = {p.dtype for p in self.model.parameters() if p.is_floating_point()}
        lower = [torch.float16, torch.bfloat16, torch.float32]
        return next((t for t in lower if t in types), torch.float64)

    @contextmanager
    def sequence(self) -> Iterator[None]:
        """Runs in the body follow each other as micro-batches do; afterwards all is as before."""
        with untouched(self.model):
            snapshot = Snapshot(self.model)
            try:
                yield
            finally:
                snapshot.restore()

    def run(self, span: Span) -> dict[str, Tensor]:
        """The sampled gradient of each parameter for rows ``span``; those that took no part have zeros.

        An error of the user's own says what was probed.
        """
        sites: CallSites[None] = CallSites(self.model)
        self._streams.restore()
        try:
            with ExitStack() as stack:
                for context in self._contexts(sites, span):
                    stack.enter_context(context)
                loss = weighted_loss(self.model, self._loss_fn, self._part(span), None).total
                gradients = self._backward(loss)
        except _Reentrant:
            self._plain_backward = True
            return self.run(span)
        except Exception as error:
            error.add_note(
                f"memfit.audit was probing rows {span[0]} to {span[1] - 1} of {self.rows} rows, in "
                + ("float64" if self.in_double else "the model's own precision")
            )
            raise
        self._note_host_random()
        self.losses[span] = float(loss.detach())
        self.kept[span] = {name: gradients[name].detach().clone() for name in self.keep}
        return {name: self._sampled(name, gradient) for name, gradient in gradients.items()}

    def column(self, gradients: dict[str, Tensor]) -> Tensor:
        """One vector of all parameters, each scaled by its norm in the whole probe."""
        return torch.cat([gradients[name] * self._scales[name] for name in self.parameters])

    def choose_coordinates(self) -> None:
        """Runs the whole probe, once and for all, and fixes which coordinates are compared."""
        with self.sequence():
            full = self.run((0, self.rows))
            self.buffers_after = {name: b.detach().clone() for name, b in self.model.named_buffers()}
        each = max(16, _MOST_COORDINATES // max(1, len(full)))
        for name, gradient in full.items():
            if gradient.numel() > each:
                largest = gradient.abs().topk(each // 2).indices
                spread = torch.linspace(0, gradient.numel() - 1, each // 2, dtype=torch.float64).long()
                self._coordinates[name] = torch.cat([largest, spread.to(largest.device)]).unique().cpu()
            chosen = self._coordinates.get(name)
            self.whole[name] = gradient if chosen is None else gradient[chosen]
        norms = {name: float(gradient.norm()) for name, gradient in self.whole.items()}
        least = _LEAST_NORM * max(norms.values())
        self._scales = {n: 1.0 / max(norm, least) if least > 0 else 1.0 for n, norm in norms.items()}

    def _part(self, span: Span) -> Any:
        """The rows of a span, as copies that the loss may write to."""
        sizes = [size for size in (span[0], span[1] - span[0], self.rows - span[1]) if size]
        part = split(self.probe, sizes)[1 if span[0] else 0]
        return map_tensors(part, lambda t: t.detach().clone().requires_grad_(t.requires_grad))

    def _contexts(self, sites: CallSites[None], span: Span) -> list[AbstractContextManager[Any]]:
        """What surrounds every run."""
        double = Doubled() if self.in_double else nullcontext()
        return [
            torch.inference_mode(False), torch.enable_grad(), same_settings(), sites,
            Watch(self.draws, span, sites), double,
        ]  # fmt: skip

    def _backward(self, loss: Tensor) -> dict[str, Tensor]:
        """The gradients, without touching ``.grad`` of anything that the loss reaches."""
        parameters = list(self.parameters.values())
        if self._plain_backward:
            with no_gradients(self.model):
                loss.backward()
                found: Sequence[Tensor | None] = [p.grad for p in parameters]
        else:
            try:
                found = torch.autograd.grad(loss, parameters, allow_unused=True)
            except RuntimeError as error:
                if "use_reentrant" in str(error):
                    raise _Reentrant from error
                raise
        if all(gradient is None for gradient in found):
            raise Unrelated("the loss does not depend on the parameters of the model it was given")
        return {
            name: torch.zeros_like(p) if gradient is None else gradient
            for (name, p), gradient in zip(self.parameters.items(), found, strict=True)
        }

    def _sampled(self, name: str, gradient: Tensor) -> Tensor:
        """The chosen coordinates, in double precision on the CPU."""
        dense = gradient.to_dense() if gradient.is_sparse else gradient
        flat = (torch.view_as_real(dense) if dense.is_complex() else dense).detach().reshape(-1)
        chosen = self._coordinates.get(name)
        return (flat if chosen is None else flat[chosen.to(flat.device)]).double().cpu()

    def _note_host_random(self) -> None:
        """Notes whether Python's or NumPy's numbers were drawn, which may be shared by the rows."""
        now, then = RandomStreams.now(), self._streams
        if now.python != then.python:
            self.host_random = ["Python's random"]
        elif any(not np.array_equal(a, b) for a, b in zip(now.numpy, then.numpy, strict=True)):
            self.host_random = ["numpy.random"]


def double_copy(model: nn.Module) -> nn.Module:
    """A copy in float64, constant parameters moved off their values. See Note [Twin] 2."""
    # Copied at once in float64: a copy in the model's own precision first takes as long again.
    doubles = {
        id(p): nn.Parameter(p.detach().double(), requires_grad=p.requires_grad)
        for p in model.parameters()
        if type(p) is nn.Parameter and p.dtype in LOWER
    }
    twin = copy.deepcopy(model, doubles).double()
    generator = torch.Generator().manual_seed(_SEED)
    with torch.no_grad():
        for p in twin.parameters():
            if p.requires_grad and p.is_floating_point() and p.numel() and _is_constant(p):
                noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
                p.add_(noise.to(p.device), alpha=_MOVED * (float(p.flatten()[0].abs()) or 1.0))
    return twin


def _is_constant(p: Tensor) -> bool:
    """Whether all entries are the same; a look at a few mostly tells."""
    few = p.flatten()[:_LOOK]
    return bool((few == few[0]).all()) and bool((p == few[0]).all())


def double_batch(batch: Any) -> Any:
    """A batch with its floating tensors in float64."""
    return map_tensors(
        batch, lambda t: t.detach().double().requires_grad_(t.requires_grad) if t.dtype in LOWER else t
    )


@contextmanager
def same_settings() -> Iterator[None]:
    """Autocast, the default type and the gradient mode are as before after the body, whatever it sets."""
    devices = ("cpu", "cuda")
    autocast = [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices]
    default, gradients = torch.get_default_dtype(), torch.is_grad_enabled()
    try:
        yield
    finally:
        for device, enabled, dtype in autocast:
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)
        torch.set_default_dtype(default)
        torch.set_grad_enabled(gradients)
