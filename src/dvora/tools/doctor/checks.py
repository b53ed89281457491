"""The checks: each by its name, with what it measures and what to do if it does not pass.

`CHECKS` has them in the order of a report. One that looks at layers does so against their dense rebuilds.
"""

import copy
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor

from ...functional import unit_rows
from ...peft.layer import DVoRALayer
from ...tensors import bias_of
from ...weight import MergePrecisionWarning
from ..dense_rebuild import Subject
from .findings import Finding, Status
from .model import CannotCheckError, Examined, Loss, called, outputs_of_the_file, restored, tensors_of

TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
"""Relative error of outputs by the dtype of what is computed with."""
GRADIENT_TOLERANCES = {torch.float64: 1e-5, torch.float32: 2e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}
QUANTISED_TOLERANCE = 2e-2
SHORT_ROW = 0.1
SMALL_ROW = 1e-2
LOST = 0.05
RUNAWAY = 0.5
"""Median relative change of a magnitude beyond which it has run away."""
FAST = 0.05
"""Learning rate of the magnitude, as a share of the median norm of a row, beyond which it will."""
_PERTURBATION = 0.01
_FRESH = "doctor"
_REFUSALS = (TypeError, ValueError, NotImplementedError)
_NO_GRADIENT = "an autograd kernel was not registered"
"""In torch's warning when an operator without a gradient is differentiated."""


class Outcome(NamedTuple):
    """What a check found, as in `Finding`; status and advice only where they are others than the check's."""

    passed: bool
    found: str
    figures: Mapping[str, float] = {}
    layers: tuple[str, ...] = ()
    status: Status | None = None
    advice: str | None = None


CHECKS: dict[str, Callable[[Examined], Finding]] = {}
"""Of each check what it finds; it is skipped where it raises `CannotCheckError`."""


def _check(
    name: str, advice: str, status: Status = "fail"
) -> Callable[[Callable[[Examined], Outcome]], Callable[[Examined], Outcome]]:
    """Add a function to the checks, with the advice and the status of what does not pass."""

    def add(check: Callable[[Examined], Outcome]) -> Callable[[Examined], Outcome]:
        def finding(examined: Examined) -> Finding:
            try:
                outcome = check(examined)
            except CannotCheckError as reason:
                return Finding(name, "skip", str(reason))
            if outcome.passed:
                return Finding(name, "pass", outcome.found, figures=outcome.figures)
            what, to_do = outcome.status or status, outcome.advice or advice
            return Finding(name, what, outcome.found, to_do, outcome.figures, outcome.layers)

        CHECKS[name] = finding
        return check

    return add


@_check(
    "identity at the start",
    "training starts from a damaged model: leave init_weights (init_lora_weights) at its default",
)
def _identity(examined: Examined) -> Outcome:
    """A fresh adapter of the same configuration against the base alone."""
    model, active = examined.model, examined.adapter
    config = copy.deepcopy(model.peft_config[active])
    config.inference_mode = False
    with restored(model):
        try:
            model.add_adapter(_FRESH, config)
        except _REFUSALS as problem:
            raise CannotCheckError(f"no second adapter fits beside this one: {_first_line(problem)}") from problem
        try:
            model.set_adapter(_FRESH)
            model.eval()
            started = examined.output()
            with model.disable_adapter():
                base = examined.output()
        finally:
            model.set_adapter(active)
            model.delete_adapter(_FRESH)
    error = distance(started, base)
    return _within({"": error}, TOLERANCES[base.dtype], "outputs of a fresh adapter differ from the base's by")


@_check(
    "outputs",
    "the layer does not compute its adapter: do not trust its results; try another version of the library, or an "
    "unquantised base",
)
def _outputs(examined: Examined) -> Outcome:
    """Each layer's outputs against those of W' as a dense matrix."""
    errors, limits = {}, {}
    for subject, x in _called(examined):
        outputs = subject.layer(x)
        errors[subject.name] = distance(outputs, subject.outputs(x, subject.rebuilt(subject.weight())))
        limits[subject.name] = QUANTISED_TOLERANCE if subject.layout is None else TOLERANCES[outputs.dtype]
    return _within(errors, limits, "outputs differ from a dense float64 rebuild by")


@_check("gradients", "training goes in a wrong direction: look for hooks, custom kernels, and a forward under no_grad")
def _gradients(examined: Examined) -> Outcome:
    """Each layer's gradients against those of its dense rebuild in float64, by autograd."""
    errors, limits = {}, {}
    for subject, x in _called(examined):
        errors[subject.name] = _gradient_error(subject, x)
        limits[subject.name] = GRADIENT_TOLERANCES[subject.dtype if subject.layout else torch.bfloat16]
    return _within(errors, limits, "gradients differ from the dense rebuild's by")


@_check(
    "norm constants",
    "the base was changed behind the layer's back (through .data, or another library): adapt it again, or load the "
    "base's weights with load_state_dict",
)
def _constants(examined: Examined) -> Outcome:
    """The constants of the norm that DVoRA keeps, against the weight as it is now."""
    errors: dict[str, float] = {}
    for subject in examined.some:
        if not isinstance(subject.layer, DVoRALayer) or subject.layout is None:
            continue
        weight, w = subject.weight(), subject.weight().norm(dim=1)
        for term in subject.terms:
            adapted = subject.layer.adapted(term.adapter)
            error = distance(adapted.w, w)
            if adapted.rank and not adapted.reads_weight:
                A, B, unit = adapted.A(weight), adapted.B(weight), unit_rows(weight, w)
                group = torch.arange(A.shape[1], device=A.device) * adapted.groups // A.shape[1]
                members = (group == number for number in range(adapted.groups))
                expected = torch.cat([B * (unit[:, of] @ A[:, of].T) for of in members], 1)
                rounded = 1e-2 if adapted.C.dtype == torch.bfloat16 else 1.0
                error = max(error, rounded * distance(adapted.C, expected))
            errors[subject.name] = max(error, errors.get(subject.name, 0.0))
    return _within(errors, 1e-4, "kept norms differ from those of the weight by")


@_check(
    "cancelled rows",
    "lower the learning rate of lambda_b and lambda_d (LoRA's matrices), or alpha: such rows point anywhere",
    "warn",
)
def _short_rows(examined: Examined) -> Outcome:
    """Rows that the update nearly cancels, so that the rescaling magnifies what is left of them."""
    shares: dict[str, float] = {}
    for subject in examined.some:
        weight = subject.weight()
        for term in subject.terms:
            if term.magnitude is not None:
                # A row of zeros has nothing that could be cancelled.
                short = term.norm(weight) < SHORT_ROW * weight.norm(dim=1)
                shares[subject.name] = max(float(short.double().mean()), shares.get(subject.name, 0.0))
    return _within(shares, 0.0, f"share of rows with less than {SHORT_ROW:g} of their norm left before rescaling:")


@_check(
    "small rows",
    "nothing has to be done if their magnitudes stay near their norms; outputs of others lose digits: leave the layer "
    "out, or compute in float64",
    "warn",
)
def _small_rows(examined: Examined) -> Outcome:
    """Rows of DVoRA that are tiny beside their bias, which is subtracted from the base's rounded outputs."""
    shares = {}
    for subject in examined.some:
        if isinstance(layer := subject.layer, DVoRALayer):
            w, bias = subject.weight().norm(dim=1), bias_of(layer.get_base_layer(), layer.measured_bias)
            small = torch.zeros_like(w) if bias is None else (w > 0) & (w < SMALL_ROW * bias.detach().abs().to(w))
            shares[subject.name] = float(small.double().mean())
    return _within(shares, 0.0, f"share of rows whose norm is less than {SMALL_ROW:g} of their bias:")


@_check(
    "calls", "leave them out (target_modules, exclude_modules), or give inputs that reach them, as experts may need"
)
def _calls(examined: Examined) -> Outcome:
    """Layers that were adapted and did not run."""
    names = [subject.name for subject in examined.layers]
    never = [name for name in names if name not in examined.layer_inputs]
    text = f"all {len(names)} adapted layers were called"
    return _none_of(never, names, text, "adapted layers were never called")


@_check(
    "gradients received",
    "what is not reached is not trained: look for a detach, a branch that is off, or layers that are not called",
)
def _received(examined: Examined) -> Outcome:
    """Trained parameters that no gradient reaches, a small step away from where they are.

    At the start of training some gradients are zero by design: lambda_d's, and those of LoRA's A.
    """
    with restored(examined.model, values=True):
        trained, generator = examined.trained(), torch.Generator().manual_seed(0)
        for parameter in trained.values():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32).to(parameter.device)
            parameter.add_((_PERTURBATION * noise).to(parameter.dtype)).requires_grad_(True)
        for subject in examined.layers:
            subject.make_differentiable()
        with torch.enable_grad(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            _loss(called(examined.model, examined.inputs), examined.loss, generator).backward()
        without = [
            name
            for name, parameter in trained.items()
            if (gradient := parameter.grad) is None or not (gradient.isfinite().all() and gradient.any())
        ]
    if stops := [str(warning.message) for warning in caught if _NO_GRADIENT in str(warning.message)]:
        advice = (
            "load the model again and train it before it is evaluated: bitsandbytes repacks 4-bit weights in the first "
            "evaluation on a CPU, and what lies before them gets no gradient from then on"
        )
        text = f"gradients end at an operator that has none: {stops[0].partition(': an')[0]}"
        return Outcome(False, text, advice=advice)
    text = f"all {len(trained)} trained tensors get a gradient"
    return _none_of(without, trained, text, "trained tensors get no gradient")


@_check("values", "training diverged: go back to a checkpoint and lower the learning rate")
def _values(examined: Examined) -> Outcome:
    """Trained parameters that are not finite."""
    trained = examined.trained()
    bad = [name for name, parameter in trained.items() if not bool(parameter.isfinite().all())]
    text = f"all values of {len(trained)} trained tensors are finite"
    return _none_of(bad, trained, text, "trained tensors hold values that are not finite")


@_check("movement", "lower the magnitude's learning rate (dvora.training.recommended_rates)")
def _movement(examined: Examined) -> Outcome:
    """Whether the adapter is still where it started, and whether its magnitude ran away."""
    changes: dict[str, float] = {}
    moved = 0
    for subject in examined.some:
        weight = subject.weight()
        for term in subject.terms:
            moved += term.moves(weight)
            if term.magnitude is not None:
                rows = weight.norm(dim=1)
                relative = (term.values()[term.magnitude].flatten() - rows).abs() / rows.clamp_min(1e-30)
                changes[subject.name] = float(relative.nan_to_num(float("inf")).median())
    figures = {"layers": float(len(examined.some)), "moved": float(moved)}
    if not moved:
        text = "no layer has moved from where it started: the adapter does nothing"
        advice = "train it; after training, look whether its values are in the optimizer and its rates above zero"
        return Outcome(False, text, figures, status="warn", advice=advice)
    text = f"{moved} of {len(examined.some)} layers have moved"
    if not changes:
        return Outcome(True, text, figures)
    worst = max(changes.values())
    figures["worst"] = worst
    if runaway := tuple(layer for layer, change in changes.items() if change > RUNAWAY):
        text = f"the magnitude ran away in {len(runaway)} of {len(changes)} layers: half of its rows changed by "
        return Outcome(False, f"{text}{worst:.0%} or more", figures, runaway)
    return Outcome(True, f"{text}; median change of a row's magnitude at most {worst:.1%}", figures)


@_check(
    "learning rates",
    "take dvora.training.recommended_rates: AdamW moves every value by about its rate in each step",
    "warn",
)
def _rates(examined: Examined) -> Outcome:
    """Learning rates that look wrong, and trained parameters that the optimizer does not have."""
    if examined.optimizer is None:
        raise CannotCheckError("no optimizer was given")
    rates = {id(value): float(group["lr"]) for group in examined.optimizer.param_groups for value in group["params"]}
    trained = {name: parameter for name, parameter in examined.model.named_parameters() if parameter.requires_grad}
    if left_out := [name for name, parameter in trained.items() if id(parameter) not in rates]:
        advice = "make the optimizer after the adapter, over all that is trained (dvora.training.parameter_groups)"
        outcome = _none_of(left_out, trained, "", "trained tensors are in no group of the optimizer")
        return outcome._replace(status="fail", advice=advice)
    fast, still = {}, []
    for subject in examined.some:
        for term in subject.terms:
            for vector, parameter in term.parameters.items():
                rate = rates.get(id(parameter))
                if rate == 0:
                    still.append(f"{subject.name}.{vector}")
                elif rate is not None and vector == term.magnitude:
                    fast[subject.name] = rate / float(subject.weight().norm(dim=1).median().clamp_min(1e-30))
    if still:
        outcome = _none_of(still, trained, "", "trained tensors have a learning rate of zero")
        return outcome._replace(advice="leave them out of training (train=...), or give them a rate")
    if not fast:
        return Outcome(True, f"all {len(trained)} trained tensors have a learning rate above zero")
    return _within(fast, FAST, "the magnitude's learning rate, as a share of the median norm of a row, is")


@_check(
    "merge rounding",
    "keep the adapter unmerged, or merge into a float32 copy of the base (dvora merge --dtype float32)",
    "warn",
)
def _merge_losses(examined: Examined) -> Outcome:
    """The share of each update that rounding to the base's dtype would change in a merge."""
    lost = {}
    for subject in examined.some:
        if subject.layout is not None:
            weight = subject.weight()
            merged = subject.rebuilt(weight)
            moved = any(term.moves(weight) for term in subject.terms)
            error = float((merged.to(subject.dtype).double() - merged).norm())
            lost[subject.name] = error / float((merged - weight).norm()) if moved else 0.0
    return _within(lost, LOST, "share of the update that a merge in the base's dtype loses:")


@_check("merge", "do not ship the merged model: keep the adapter, or merge into a float32 copy of the base")
def _merge(examined: Examined) -> Outcome:
    """The outputs of the model with its adapter merged into the weights, against those of the adapted model."""
    if any(subject.layout is None for subject in examined.layers):
        raise CannotCheckError("the base is quantised: a merge would quantise it anew")
    merges: Any = examined.model
    with restored(examined.model, values=True), warnings.catch_warnings():
        # The check "merge rounding" reports it.
        warnings.simplefilter("ignore", MergePrecisionWarning)
        try:
            merges.merge_adapter()
            error = distance(examined.output(), examined.outputs)
        except _REFUSALS as problem:
            raise CannotCheckError(f"not possible here: {problem}") from problem
        finally:
            if any(subject.layer.merged for subject in examined.layers):
                merges.unmerge_adapter()
    limit = max(TOLERANCES[subject.dtype] for subject in examined.layers)
    return _within({"": error}, 10 * limit, "outputs of the merged model differ by")


@_check("mixed batch", "serve one adapter at a time until it is mended")
def _mixed_batch(examined: Examined) -> Outcome:
    """A batch whose rows have the adapter and the base by turns, against the rows of both."""
    if any(isinstance(one.layer, LoraLayer) and term.magnitude for one in examined.layers for term in one.terms):
        # It would refuse in the middle of a pass, and leave its hooks behind.
        raise CannotCheckError("PEFT's DoRA takes no batches of several adapters")
    adapter, adapted = examined.adapter, examined.outputs
    rows = [adapter if row % 2 else "__base__" for row in range(len(adapted))]
    if len(rows) < 2:
        raise CannotCheckError("the inputs have a single row")
    try:
        mixed = examined.output(adapter_names=rows)
        with examined.model.disable_adapter():
            base = examined.output()
    except (*_REFUSALS, AttributeError) as problem:
        raise CannotCheckError(f"not possible here: {_first_line(problem)}") from problem
    expected = torch.stack([adapted[row] if row % 2 else base[row] for row in range(len(rows))])
    limit = 10 * TOLERANCES[adapted.dtype]
    return _within({"": distance(mixed, expected)}, limit, "rows of a mixed batch differ from single ones by")


@_check(
    "save and load",
    "the file is not the adapter: look which of its values differ (dvora inspect), and in which dtype they are",
)
def _round_trip(examined: Examined) -> Outcome:
    """The outputs of the saved adapter in a fresh process, against those of the model."""
    error = distance(outputs_of_the_file(examined), examined.outputs.cpu())
    what = "outputs after saving and loading in a fresh process differ by"
    return _within({"": error}, TOLERANCES[examined.outputs.dtype], what)


def distance(actual: Tensor, expected: Tensor) -> float:
    """`||actual - expected|| / ||expected||` in float64."""
    actual, expected = actual.detach().double(), expected.detach().double()
    size = torch.linalg.vector_norm(expected)
    return float(torch.linalg.vector_norm(actual - expected) / torch.where(size > 0, size, 1.0))


def _within(values: Mapping[str, float], limits: float | Mapping[str, float], what: str) -> Outcome:
    """One number a layer, or one of the model by the name "", which has to stay below a limit; NaN is above any."""
    if not values:
        raise CannotCheckError("no layer that this can be checked on")
    layer_limits = limits if isinstance(limits, Mapping) else dict.fromkeys(values, limits)
    sizes = {name: value if value == value else float("inf") for name, value in values.items()}
    # The farthest above its own limit first; of those that pass, the nearest to it.
    ordered = sorted(sizes, key=lambda name: -sizes[name] / max(layer_limits[name], 1e-30))
    above = [name for name in ordered if sizes[name] > layer_limits[name]]
    worst, limit = sizes[ordered[0]], layer_limits[ordered[0]]
    text = f"{what} {'at most ' if len(values) > 1 else ''}{worst:.2g} (limit {limit:.1g})"
    if above and len(values) > 1:
        text += f"; too much in {len(above)} of {len(values)} layers, most in {above[0]}"
    figures = {"worst": worst, "limit": limit, "layers": float(len(values))}
    return Outcome(not above, text, figures, tuple(filter(None, above)))


def _none_of(bad: Collection[str], names: Collection[str], right: str, wrong: str) -> Outcome:
    """Names of which none should be there."""
    text = f"{len(bad)} of {len(names)} {wrong}, first {next(iter(bad))}" if bad else right
    return Outcome(not bad, text, {"layers": float(len(names))}, tuple(bad))


def _called(examined: Examined) -> Iterator[tuple[Subject, Tensor]]:
    """The layers that are checked one by one and were called, with their inputs."""
    for subject in examined.some:
        if subject.name in examined.layer_inputs:
            yield subject, examined.layer_inputs[subject.name]


def _first_line(problem: Exception) -> str:
    return str(problem).splitlines()[0]


def _loss(outputs: Any, loss: Loss | None, generator: torch.Generator) -> Tensor:
    """The given loss, the model's own, or a random sum of its outputs."""
    if loss is not None:
        return loss(outputs)
    of_model: Tensor | None = outputs.get("loss") if isinstance(outputs, Mapping) else None
    if of_model is not None:
        return of_model
    randoms = ((tensor, torch.randn(tensor.shape, generator=generator)) for tensor in tensors_of(outputs))
    return torch.stack([(tensor.float() * random.to(tensor.device)).sum() for tensor, random in randoms]).sum()


def _gradient_error(subject: Subject, x: Tensor) -> float:
    """The largest relative error of the gradient of a trained vector or matrix."""
    # The rebuild has copies, since hooks of the parameters would act on its gradients too.
    rebuild = replace(subject, terms=copy.deepcopy(subject.terms))
    both = [[value for term in layer.terms for value in term.parameters.values()] for layer in (subject, rebuild)]
    for parameter in (*both[0], *both[1]):
        parameter.requires_grad_(True)
    subject.make_differentiable()
    with torch.enable_grad():
        outputs = (subject.layer(x).double(), rebuild.outputs(x, rebuild.rebuilt(subject.weight())))
        weights = torch.randn(outputs[1].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        gradients, expected = (
            torch.autograd.grad((y * weights.to(y.device)).sum(), parameters, materialize_grads=True)
            for y, parameters in zip(outputs, both, strict=True)
        )
    errors = [
        (gradient.double() - right.double()).norm() / torch.maximum(gradient.norm(), right.norm()).clamp_min(1e-12)
        for gradient, right in zip(gradients, expected, strict=True)
    ]
    return float(torch.stack(errors).max())
