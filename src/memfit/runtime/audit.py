"""Decides whether the gradient of a batch is the weighted sum of the gradients of its micro-batches.

Note [Audit]
 1. What cannot accumulate whatever the loss is refused first: optimizers that step inside the backward or
    call the loss themselves.
 2. A twin of the model (``runtime/twin.py``) runs a few rows whole and in unequal parts, one after the other
    as micro-batches are. ``core/audit.py`` says which counter makes them add up.
 3. What was seen on the way decides first: an op that mixes rows, a draw that the rows share.
 4. If a counter fits, buffers must end as after the whole batch, and gradient hooks must be linear.
 5. If none fits, each cause is taken away in turn: state (every part from the same start), hooks of modules.
    Then all spans of rows are run, which tell mixed terms from coupled rows, and the modules' outputs say
    whether the loss or a layer couples.
"""

from __future__ import annotations

import inspect
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from memfit.core.audit import (
    Audit,
    Evidence,
    Finding,
    Kind,
    Span,
    all_spans,
    exact_counter,
    explained,
    unequal_partitions,
)
from memfit.errors import InexactAccumulation, UnsupportedModel
from memfit.runtime.batch import rows_of, split, tensors_of
from memfit.runtime.company import mixing_module
from memfit.runtime.doubled import Doubled
from memfit.runtime.fake import is_fake, untouched
from memfit.runtime.job import Job, each_optimizer
from memfit.runtime.preserve import Snapshot
from memfit.runtime.sample import Sample, samples_of
from memfit.runtime.twin import Twin, double_batch, double_copy
from memfit.runtime.units import ignored_values, known_counters

Hooks = dict[str, list[Callable[[Tensor], Tensor | None]]]

LARGEST_COPY_BYTES = 4 << 30
_ROWS = 6
_FEW_ROWS = 3  # enough to prove a counter, not to explain why none fits
_ENOUGH_ROWS = 5  # have more spans than a sum of two means has unknowns
_FEW_TOKENS = 16
LARGE_BYTES = 256 << 20
_SAMPLED_PARAMETERS = 32
_LARGEST_SAMPLED = 1 << 16
_LARGEST_LOOKED_AT = 1 << 20
KEEP_WHOLE = "keep the batch whole (leave micro_batch_size out; memfit recomputes instead)"


class _Probing(NamedTuple):
    """A twin that runs, with what it stands for. ``lost`` is what it cannot show."""

    twin: Twin
    job: Job
    hooks: Hooks
    is_thinned: bool
    is_sampled: bool
    lost: tuple[str, ...]
    notes: tuple[str, ...]


_UNDECIDED = {Kind.UNDECIDED, Kind.SAME}
_OF_THE_LOSS = {
    *_UNDECIDED,
    Kind.UNITS,
    Kind.MIXED,
    Kind.STATISTIC,
    Kind.COUPLED_LOSS,
    Kind.COUPLED_LAYER,
}

_CURES: dict[Kind, tuple[str, ...]] = {
    Kind.UNITS: (
        "say what the loss is a mean over: count=lambda part: <number of units in this micro-batch>, for "
        "class weights count=lambda part: float(class_weights[part['labels']].sum())",
        "return the sum from loss_fn instead of the mean, and divide by a fixed number",
        KEEP_WHOLE,
    ),
    Kind.MIXED: (
        "return the terms as a mapping {'name': term}: each one then has a weight of its own",
        "make every term a mean over the same unit, or add up sums divided by fixed numbers",
        KEEP_WHOLE,
    ),
    Kind.STATISTIC: (
        "give the outputs apart: fit(..., outputs_fn=...) with loss_fn(outputs, batch) is exact in two "
        "passes",
        "return the additive statistic itself (the mean square instead of its root, the mean log-likelihood "
        "instead of the perplexity)",
        KEEP_WHOLE,
    ),
    Kind.COUPLED_LOSS: (
        "give the outputs apart: fit(..., outputs_fn=...) with loss_fn(outputs, batch) is exact in two "
        "passes",
        "compute what the rows share (advantages, frequencies) before the batch is split, and put it in the "
        "batch",
        KEEP_WHOLE,
    ),
    Kind.COUPLED_LAYER: (
        "for BatchNorm: fit(..., batch_norm='frozen') if it may run on its running statistics, or 'ghost' if "
        "each micro-batch may be normalised by its own (another gradient)",
        "put the layer into eval mode, or use one that works row by row (GroupNorm, LayerNorm)",
        KEEP_WHOLE,
    ),
    Kind.STATEFUL: (
        "update the state once a step, outside of the forward, or put the module into eval mode",
        KEEP_WHOLE,
    ),
    Kind.SHARED_RANDOMNESS: (
        "draw on the whole batch before it is split (mixup, cutmix), and put the result in the batch",
        "draw one number a row",
        KEEP_WHOLE,
    ),
    Kind.GRADIENT_HOOK: (
        "remove the hook and change the gradient once, after step(batch) and before optimizer.step()",
        "leave it if it is a parameter's: a step of memfit.fit runs it once, on the whole gradient",
        KEEP_WHOLE,
    ),
    Kind.OPTIMIZER: (
        "use an optimizer that steps once after the backward, on the gradient in .grad",
        "if it calls the loss itself, let it call a step of memfit.fit, which runs the whole batch: "
        "closure = lambda: (optimizer.zero_grad(), step(batch))[1]",
    ),
    Kind.SAME: (
        "audit a batch whose rows differ, or say with count= what the loss is a mean over",
        KEEP_WHOLE,
    ),
    Kind.UNDECIDED: (
        "say with count= what the loss is a mean over, if you know that it is additive",
        KEEP_WHOLE,
    ),
}


def cures(kind: Kind) -> tuple[str, ...]:
    """What the user can do where a kind of loss or layer hinders exact accumulation."""
    return _CURES.get(kind, ())


def audit_job(
    job: Job,
    *,
    largest_copy_bytes: int = LARGEST_COPY_BYTES,
    large_bytes: int = LARGE_BYTES,
    judges_hooks: bool = True,
) -> Audit:
    """The same of a loss that is one number; a model whose float64 copy is larger is probed itself, in part.

    Gradient hooks of parameters are judged unless they will run once, on the whole gradient.

    Where copy and gradients are above ``large_bytes``, a few tokens of 3 rows are looked at first, and no
    gradient of a large parameter; more only where that decides nothing.
    """
    _refuse_fake(job)
    trained = [name for name, p in job.model.named_parameters() if p.requires_grad]
    if not trained:
        raise ValueError(
            f"{type(job.model).__name__} has no parameter that requires a gradient, so there is nothing to "
            "audit: call requires_grad_() on what is to be trained"
        )
    reason = _stepping_inside(job)
    if reason is not None:
        return Audit(Kind.OPTIMIZER, None, math.nan, reason, _CURES[Kind.OPTIMIZER])
    rows = rows_of(job.batch)
    if rows < 3:
        return undecided(f"{rows} rows have no unequal parts: audit a batch of at least 3 rows")
    size_bytes = sum(16 * p.numel() for p in job.model.parameters())  # a copy in float64 and its gradients
    hooks: Hooks = {
        name: list(p._backward_hooks.values())
        for name, p in job.model.named_parameters()
        if p._backward_hooks and judges_hooks
    }
    may_copy = size_bytes <= largest_copy_bytes
    with _no_trace(job.model):
        if size_bytes <= large_bytes:
            return _attempt(job, hooks, _Effort(_ROWS, may_copy=may_copy))
        may_copy = size_bytes // 2 <= largest_copy_bytes
        found = _attempt(job, hooks, _Effort(_FEW_ROWS, may_copy=may_copy, is_light=True, explains=False))
        if found.is_exact or found.kind not in _OF_THE_LOSS:
            return found
        if found.kind in _UNDECIDED and size_bytes <= largest_copy_bytes:
            return _attempt(job, hooks, _Effort(_ROWS, may_copy=True))  # all of the gradient may decide it
        return _attempt(job, hooks, _Effort(_ENOUGH_ROWS, may_copy=may_copy, is_light=True))


class _Effort(NamedTuple):
    """How much an attempt looks at: rows; and if light, few tokens and no gradient of a large parameter.

    One that ``explains`` goes on to find the cause where no counter fits.
    """

    rows: int
    may_copy: bool
    is_light: bool = False
    explains: bool = True


def _attempt(job: Job, hooks: Hooks, effort: _Effort) -> Audit:
    """The audit by one probe."""
    probing = _probing(job, hooks, effort)
    try:
        return _judged(probing, explains=effort.explains)
    finally:
        probing.twin.draws.restore_generators()


def _refuse_fake(job: Job) -> None:
    """Raises if there are no numbers to compare."""
    named = [*job.model.named_parameters(), *job.model.named_buffers(), *tensors_of(job.batch)]
    fake = next((name for name, t in named if is_fake(t)), None)
    if fake is not None:
        raise UnsupportedModel(
            f"'{fake}' is fake or on the meta device, so there are no gradients to compare: audit the model "
            "with real tensors (a smaller one of the same kind will do)",
            owner=fake,
        )


def _stepping_inside(job: Job) -> str | None:
    """The optimizer or hook that steps before all micro-batches are summed, or calls the loss itself."""
    for name, p in job.model.named_parameters():
        if p._post_accumulate_grad_hooks:
            return f"{name} (a hook runs whenever its gradient has been accumulated)"
    reasons = (_calling_the_loss(optimizer) for optimizer in each_optimizer(job.optimizer))
    return next((reason for reason in reasons if reason is not None), None)


def _calling_the_loss(optimizer: torch.optim.Optimizer) -> str | None:
    """Why an optimizer cannot step on the sum of gradients, None if it can."""
    name = type(optimizer).__name__
    step = inspect.signature(optimizer.step).parameters.values()
    if any(p.name == "closure" and p.default is inspect.Parameter.empty for p in step):
        return f"{name} (calls the loss several times in one step)"
    if hasattr(optimizer, "first_step") and hasattr(optimizer, "second_step"):
        return f"{name} (steps twice a batch)"
    if any(word in name.lower() for word in ("lomo", "layerwise")):
        return f"{name} (steps inside the backward)"
    return None


def undecided(reason: str) -> Audit:
    """No answer, for this reason."""
    return Audit(Kind.UNDECIDED, None, math.nan, "loss_fn", _CURES[Kind.UNDECIDED], (reason,))


# ---- the twin ------------------------------------------------------------------------------------


@contextmanager
def _no_trace(model: nn.Module) -> Iterator[None]:
    """Whatever the body does to a model, its random streams and its parameters' hooks is undone."""
    hooks = [(p, dict(p._backward_hooks)) for p in model.parameters() if p._backward_hooks]
    with torch.inference_mode(False), torch.enable_grad(), untouched(model):
        snapshot = Snapshot(model)
        for p, _ in hooks:
            p._backward_hooks.clear()  # type: ignore[union-attr]
        try:
            yield
        finally:
            snapshot.restore()
            for p, entries in hooks:
                p._backward_hooks.update(entries)  # type: ignore[union-attr]


def _probing(job: Job, hooks: Hooks, effort: _Effort) -> _Probing:
    """The most precise twin on which the loss runs."""
    names = frozenset(name for name, p in job.model.named_parameters() if p.requires_grad)
    sampled = names if effort.may_copy else _few_parameters(job.model)
    if effort.may_copy and effort.is_light:
        sampled = _light_parameters(job.model) | frozenset(hooks)
    lost, notes = list[str](), list[str]()
    unseen = f"the gradients of {len(names - sampled)} of {len(names)} parameters"
    if not effort.may_copy:
        lost.append(f"{unseen}: the model is too large to copy")
    elif sampled != names:
        notes.append(f"{unseen} were not compared, being large; their losses were")
    copied = _copied(job.model, lost) if effort.may_copy else None
    tokens = _FEW_TOKENS if effort.is_light else None
    samples = samples_of(job.batch, effort.rows, tokens, ignored_values(job.model, job.loss_fn))
    models = [None] if copied is None else [copied, None]
    tries = [(model, sample) for model in models for sample in samples]
    for number, (model, sample) in enumerate(tries):
        twin = _twin(job, model, sample, sampled)
        twin.keep = sampled & frozenset(hooks)
        try:
            twin.choose_coordinates()
        except Exception as error:
            twin.draws.restore_generators()
            if number == len(tries) - 1:
                raise
            if twin.in_double and number == len(samples) - 1:
                lost.append(f"float64: the loss does not run in it ({type(error).__name__}: {error})")
            continue
        if not twin.has_gradient and sample is not samples[-1]:
            continue  # all that was left of the rows is ignored
        if not twin.in_double:
            lost.append(f"differences below {twin.tolerance:.0e}: the model was probed in its own precision")
        if sample.cut_tokens is not None:
            notes.append("sequences were cut to {} of {} tokens".format(*sample.cut_tokens))
        is_sampled = sampled != names
        return _Probing(twin, job, hooks, sample.has_thin_labels, is_sampled, tuple(lost), tuple(notes))
    raise AssertionError("a batch has at least one sample")


def _twin(job: Job, copied: nn.Module | None, sample: Sample, names: frozenset[str]) -> Twin:
    """A twin of the copy, or of the model itself, on a sample."""
    in_double = copied is not None
    probe = double_batch(sample.batch) if in_double else sample.batch
    return Twin(copied if copied is not None else job.model, job.loss_fn, probe, names, in_double=in_double)


def _light_parameters(model: nn.Module) -> frozenset[str]:
    """All but the large parameters: what reaches those passes through their small neighbours too."""
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    small = [name for name, size in trained.items() if size <= _LARGEST_LOOKED_AT]
    return frozenset(small or sorted(trained, key=lambda name: trained[name])[:2])


def _copied(model: nn.Module, lost: list[str]) -> nn.Module | None:
    """A copy in float64, or None with the reason."""
    try:
        return double_copy(model)
    except Exception as error:
        lost.append(f"float64: the model cannot be copied ({type(error).__name__}: {error})")
        return None


def _few_parameters(model: nn.Module) -> frozenset[str]:
    """Small parameters from all depths of a model; the smallest one if none is small."""
    trained = [(name, p.numel()) for name, p in model.named_parameters() if p.requires_grad]
    small = [name for name, size in trained if size <= _LARGEST_SAMPLED]
    if not small:
        return frozenset({min(trained, key=lambda entry: entry[1])[0]})
    stride = -(-len(small) // _SAMPLED_PARAMETERS)
    return frozenset({*small[::stride], small[-1]})


# ---- evidence ------------------------------------------------------------------------------------


def _evidence(twin: Twin, job: Job, spans: tuple[Span, ...] = ()) -> tuple[Evidence, list[str]]:
    """Gradients of all partitions, each run in one sequence, or of ``spans``, each from the same start.

    The second value names the buffers that end elsewhere after parts than after the whole.
    """
    partitions = unequal_partitions(twin.rows)
    columns = {(0, twin.rows): twin.column(twin.whole)}
    ends = [twin.buffers_after]
    groups: list[tuple[Span, ...]] = [(span,) for span in spans if span not in columns] or [*partitions]
    for group in groups:
        with twin.sequence():
            for span in group:
                columns[span] = twin.column(twin.run(span))
            ends.append({name: b.detach().clone() for name, b in twin.model.named_buffers()})
    drifting = [] if spans else _drifting(ends, twin.tolerance)
    used = [*columns]
    finite = [span for span in used if bool(columns[span].isfinite().all())]
    basis = torch.linalg.qr(torch.stack([columns[span] for span in finite], dim=1), mode="r").R.numpy()
    vectors = {span: basis[:, i] for i, span in enumerate(finite)}
    missing = {span: basis[:, 0] * math.nan for span in used if span not in vectors}
    counts = _counts(twin, job, used)
    return Evidence(twin.rows, {**missing, **vectors}, partitions, counts, twin.tolerance), drifting


def _counts(twin: Twin, job: Job, spans: list[Span]) -> dict[str, dict[Span, float]]:
    """What each known counter counts in each span; those that do not apply are left out."""
    found: dict[str, dict[Span, float]] = {}
    for name, counter in known_counters(twin.model, job.loss_fn, twin.probe).items():
        try:
            found[name] = {span: float(counter(_rows(twin.probe, span))) for span in spans}
        except (InexactAccumulation, ValueError, IndexError, RuntimeError):
            continue
    return found


def _rows(batch: Any, span: Span) -> Any:
    """Some neighbouring rows of a batch."""
    sizes = [size for size in (span[0], span[1] - span[0], rows_of(batch) - span[1]) if size]
    return split(batch, sizes)[1 if span[0] else 0]


def _drifting(ends: list[dict[str, Tensor]], tolerance: float) -> list[str]:
    """The buffers that are not the same after every way to run the batch."""
    whole, *others = ends
    return [
        name
        for name, after in whole.items()
        if any(
            name not in end
            or end[name].shape != after.shape
            or not torch.allclose(
                end[name].double(), after.double(), rtol=tolerance, atol=tolerance, equal_nan=True
            )
            for end in others
        )
    ]


# ---- verdict -------------------------------------------------------------------------------------


def _judged(probing: _Probing, *, explains: bool) -> Audit:
    """The audit of a twin that runs. See Note [Audit]."""
    twin = probing.twin
    if not twin.is_precise:
        return undecided("; ".join((*probing.lost, "half precision cannot tell weights apart")))
    try:
        evidence, drifting = _evidence(twin, probing.job)
        norm = float(abs(evidence.whole).max())
        if not 0 < norm < math.inf:
            what = "zero" if norm == 0 else "not finite"
            return undecided(f"the gradient of the probed rows is {what}, so there is nothing to compare")
        finding = exact_counter(evidence)
        kind, owner = _seen(twin)
        if kind is None and finding.counter is not None:
            finding, kind, owner = _behind_exact(probing, evidence, finding, drifting)
        elif kind is None and finding.kind is not Kind.SAME and explains:
            finding, kind, owner = _cause(probing, finding, drifting)
    except Exception as error:  # the whole probe runs: it is the parts that do not
        return _failed_on_parts(probing, error)
    return _answer(probing, evidence, finding, kind, owner)


def _answer(probing: _Probing, evidence: Evidence, finding: Finding, kind: Kind | None, owner: str) -> Audit:
    """The audit that says what was found; ``kind`` is what forbids accumulation besides the gradients."""
    twin = probing.twin
    answer = finding.kind if kind is None else kind
    undecided = [*probing.lost, *_ambiguous(finding, is_thinned=probing.is_thinned)]
    undecided += [
        f"the random numbers of {name}, which cannot be replayed by rows" for name in twin.draws.unknown
    ]
    notes = _notes(twin, evidence, finding)
    is_part = probing.is_sampled or not twin.in_double
    if kind is None and finding.counter is not None and not (is_part and notes.losses_differ):
        lines = (*notes.lines, *probing.notes)
        return Audit(
            answer, finding.counter, finding.error, owner, (), tuple(undecided), finding.weights, lines,
            finding.equals,
        )  # fmt: skip
    if finding.kind is Kind.SAME:
        undecided.append("equal gradients fit any weights")
    elif finding.counter is not None and kind is None:
        answer = Kind.UNDECIDED
        undecided.append("the gradients that were compared add up, and the losses do not: the others may not")
    terms = (f"terms over {' and over '.join(finding.units)}",) if answer is Kind.MIXED else ()
    weights = finding.weights if kind is None else ()
    return Audit(answer, None, finding.error, owner, _CURES[answer], tuple(undecided), weights, terms)


def _failed_on_parts(probing: _Probing, error: Exception) -> Audit:
    """The loss runs on the whole probe and not on some of its rows, so it cannot be split."""
    where = getattr(error, "__notes__", ["memfit.audit was comparing gradients"])[-1]
    kind, owner = _seen(probing.twin)
    kind = kind or Kind.UNDECIDED
    reason = f"the loss fails on parts of the batch ({type(error).__name__}: {error}; {where})"
    reasons = (*probing.lost, reason) if kind is Kind.UNDECIDED else probing.lost
    return Audit(kind, None, math.nan, owner, _CURES[kind], reasons)


def _seen(twin: Twin) -> tuple[Kind | None, str]:
    """What an op or a draw has shown, whatever the gradients are."""
    if twin.draws.mixing:
        return Kind.COUPLED_LAYER, twin.draws.mixing[0]
    if twin.draws.shared:
        return Kind.SHARED_RANDOMNESS, twin.draws.shared[0]
    if twin.host_random:
        return Kind.SHARED_RANDOMNESS, twin.host_random[0]
    return None, "loss_fn"


def _behind_exact(
    probing: _Probing, evidence: Evidence, finding: Finding, drifting: list[str]
) -> tuple[Finding, Kind | None, str]:
    """What forbids accumulation although the gradients of the parts add up."""
    if drifting:
        return finding, Kind.STATEFUL, drifting[0]
    for name in sorted(probing.twin.keep):
        error = _hook_error(probing, name, evidence, finding.weights)
        if error > probing.twin.tolerance:
            return finding._replace(error=error), Kind.GRADIENT_HOOK, name
    return finding, None, "loss_fn"


def _cause(probing: _Probing, former: Finding, drifting: list[str]) -> tuple[Finding, Kind | None, str]:
    """Why no counter fits: the causes are taken away one by one. See Note [Audit] 5."""
    twin, job = probing.twin, probing.job
    separate, _ = _evidence(twin, job, all_spans(twin.rows))
    finding = exact_counter(separate)
    if finding.counter is not None:
        return former, Kind.STATEFUL, drifting[0] if drifting else "loss_fn"
    for name, module in twin.model.named_modules():
        if module._backward_hooks or module._backward_pre_hooks:
            with untouched(twin.model):
                module._backward_hooks, module._backward_pre_hooks = OrderedDict(), OrderedDict()
                bare = Twin(
                    twin.model, job.loss_fn, twin.probe, frozenset(twin.parameters), in_double=twin.in_double
                )
                bare.choose_coordinates()
                if exact_counter(_evidence(bare, job)[0]).counter is not None:
                    return former, Kind.GRADIENT_HOOK, name or "model"
    finding = explained(separate)
    if finding.kind is not Kind.COUPLED_LOSS:
        return finding, None, "loss_fn"
    if twin.draws.unknown:
        return finding._replace(kind=Kind.UNDECIDED), None, "loss_fn"
    mixing = mixing_module(twin, unequal_partitions(twin.rows)[0][-1])
    return finding, None if mixing is None else Kind.COUPLED_LAYER, mixing or "loss_fn"


def _hook_error(probing: _Probing, name: str, evidence: Evidence, weights: tuple[float, ...]) -> float:
    """The relative error of a parameter's gradient if its hooks see the parts and not their sum."""
    kept = probing.twin.kept
    whole = _hooked(probing, name, kept[0, evidence.rows][name])
    parts = zip(weights, evidence.partitions[0], strict=True)
    total = sum(
        (w * _hooked(probing, name, kept[span][name]) for w, span in parts if w), torch.zeros_like(whole)
    )
    return float((total - whole).norm() / whole.norm()) if whole.any() else float(total.norm())


def _hooked(probing: _Probing, name: str, gradient: Tensor) -> Tensor:
    """What a parameter's hooks make of a gradient."""
    gradient = gradient.clone()
    with Doubled() if probing.twin.in_double else nullcontext():
        for hook in probing.hooks[name]:
            changed = hook(gradient)
            gradient = gradient if changed is None else changed
    return gradient


def _ambiguous(finding: Finding, *, is_thinned: bool) -> list[str]:
    """Other counters that count alike here, and might not in another batch."""
    others = [
        n
        for n in finding.equals
        if n.startswith("sum of") or (not is_thinned and ("label" in n or "-100" in n))
    ]
    if finding.counter is None or not others or finding.counter == "sum":
        return []
    return [f"whether the mean is over {finding.counter} or over {others[0]}: they count alike in this batch"]


class _Notes(NamedTuple):
    """What is worth knowing about an exact accumulation."""

    lines: tuple[str, ...]
    losses_differ: bool


def _notes(twin: Twin, evidence: Evidence, finding: Finding) -> _Notes:
    """Remarks on the randomness and on the losses, which need not add up where gradients do."""
    lines = []
    if twin.draws.drawn:
        lines.append(
            "random numbers are drawn row by row: micro-batches are equal in distribution, not in bits"
        )
    if finding.counter is None:
        return _Notes(tuple(lines), False)
    pairs = zip(finding.weights, evidence.partitions[0], strict=True)
    total, whole = sum(w * twin.losses[span] for w, span in pairs if w), twin.losses[0, twin.rows]
    differ = abs(total - whole) > twin.loss_tolerance * max(1.0, abs(whole))
    if differ:
        lines.append(f"the gradients add up, the losses do not ({total:.6g} for {whole:.6g})")
    return _Notes(tuple(lines), differ)
