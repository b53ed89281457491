"""Checks of each adapted layer by itself, against its dense rebuild."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ...functional import unit_rows
from ...peft.layer import DVoRALayer
from ...tensors import bias_of
from ..dense_rebuild import Subject, Term
from .findings import Finding, within_limits
from .watched import distance

TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
"""Relative error of outputs by the dtype of what is computed with."""
GRADIENT_TOLERANCES = {torch.float64: 1e-5, torch.float32: 2e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}
QUANTISED_TOLERANCE = 2e-2
SHORT_ROW = 0.1
SMALL_ROW = 1e-2
LOST = 0.05
_STEP = 1e-5


def outputs(every: tuple[Subject, ...], inputs: Mapping[str, Tensor]) -> Finding:
    """Each layer's outputs against those of W' as a dense matrix."""
    errors, limits = {}, {}
    for subject in every:
        if subject.name in inputs:
            x = inputs[subject.name]
            with torch.no_grad():
                found = subject.layer(x)
                errors[subject.name] = distance(found, subject.outputs(x, subject.rebuilt(subject.weight())))
            limits[subject.name] = QUANTISED_TOLERANCE if subject.layout is None else TOLERANCES[found.dtype]
    return within_limits(
        "outputs",
        errors,
        limits,
        "outputs differ from a dense float64 rebuild by",
        "the layer does not compute its adapter: do not trust its results; try another version of the library, or an "
        "unquantised base",
    )


def gradients(every: tuple[Subject, ...], inputs: Mapping[str, Tensor]) -> Finding:
    """Each layer's gradients against finite differences of its dense rebuild."""
    errors, limits = {}, {}
    for subject in every:
        if subject.name in inputs:
            errors[subject.name] = _gradient_error(subject, inputs[subject.name])
            limits[subject.name] = GRADIENT_TOLERANCES[subject.dtype if subject.layout else torch.bfloat16]
    return within_limits(
        "gradients",
        errors,
        limits,
        "gradients differ from finite differences by",
        "training goes in a wrong direction: look for hooks, custom kernels, and a forward under no_grad",
    )


def constants(every: tuple[Subject, ...]) -> Finding:
    """The constants of the norm that DVoRA keeps, against the weight as it is now."""
    errors: dict[str, float] = {}
    for subject in every:
        if isinstance(subject.layer, DVoRALayer) and subject.layout is not None and not subject.layer.merged:
            weight = subject.weight()
            for adapter in subject.layer.active_adapters:
                if adapter in subject.layer.dvora_adapted:
                    adapted = subject.layer.adapted(adapter)
                    error = distance(adapted.w, weight.norm(dim=1))
                    if adapted.C is not None and adapted.rank:
                        expected = adapted.B(weight) * (unit_rows(weight, weight.norm(dim=1)) @ adapted.A(weight).T)
                        rounded = 1e-2 if adapted.C.dtype == torch.bfloat16 else 1.0
                        error = max(error, rounded * distance(adapted.C, expected))
                    errors[subject.name] = max(error, errors.get(subject.name, 0.0))
    return within_limits(
        "norm constants",
        errors,
        1e-4,
        "kept norms differ from those of the weight by",
        "the base was changed behind the layer's back (through .data, or another library): adapt it again, or load the "
        "base's weights with load_state_dict",
    )


def short_rows(every: tuple[Subject, ...]) -> Finding:
    """Rows that the update nearly cancels, so that the rescaling magnifies what is left of them."""
    shares: dict[str, float] = {}
    for subject in every:
        weight = subject.weight()
        rescaled = [term for term in subject.terms if term.magnitude is not None]
        for term in rescaled:
            # A row of zeros has nothing that could be cancelled.
            short = term.norm(term.values(), weight) < SHORT_ROW * weight.norm(dim=1)
            share = float(short.double().mean())
            shares[subject.name] = max(share, shares.get(subject.name, 0.0))
    return within_limits(
        "cancelled rows",
        shares,
        0.0,
        f"share of rows with less than {SHORT_ROW:g} of their norm left before rescaling:",
        "lower the learning rate of lambda_b and lambda_d (LoRA's matrices), or alpha: such rows point anywhere",
        status="warn",
    )


def small_rows(every: tuple[Subject, ...]) -> Finding:
    """Rows of DVoRA that are tiny beside their bias, which is subtracted from the base's rounded outputs."""
    shares = {}
    for subject in every:
        layer = subject.layer
        if isinstance(layer, DVoRALayer):
            w, bias = subject.weight().norm(dim=1), bias_of(layer.get_base_layer(), layer.measured_bias)
            small = torch.zeros_like(w) if bias is None else (w > 0) & (w < SMALL_ROW * bias.detach().abs().to(w))
            shares[subject.name] = float(small.double().mean())
    return within_limits(
        "small rows",
        shares,
        0.0,
        f"share of rows whose norm is less than {SMALL_ROW:g} of their bias:",
        "nothing has to be done if their magnitudes stay near their norms; outputs of others lose digits: leave the "
        "layer out, or compute in float64",
        status="warn",
    )


def merge_losses(every: tuple[Subject, ...]) -> Finding:
    """The share of each update that rounding to the base's dtype would change in a merge."""
    lost = {}
    for subject in every:
        if subject.layout is not None:
            weight = subject.weight()
            merged = subject.rebuilt(weight)
            moved = any(term.moves(weight) for term in subject.terms)
            error = float((merged.to(subject.dtype).double() - merged).norm())
            lost[subject.name] = error / float((merged - weight).norm()) if moved else 0.0
    return within_limits(
        "merge rounding",
        lost,
        LOST,
        "share of the update that a merge in the base's dtype loses:",
        "keep the adapter unmerged, or merge into a float32 copy of the base (dvora merge --dtype float32)",
        status="warn",
    )


def _gradient_error(subject: Subject, x: Tensor) -> float:
    """The largest error of a directional derivative, as a share of the gradient's norm."""
    weight, generator = subject.weight(), torch.Generator().manual_seed(0)
    parameters = [parameter.requires_grad_(True) for term in subject.terms for parameter in term.parameters.values()]
    subject.make_differentiable()
    with torch.enable_grad():
        found = subject.layer(x)
        weights = torch.randn(found.shape, generator=generator, dtype=torch.float64).to(found.device)
        gradients = torch.autograd.grad((found.double() * weights).sum(), parameters, allow_unused=True)
    by_id = {id(parameter): each for parameter, each in zip(parameters, gradients, strict=True)}
    worst = 0.0
    for term in subject.terms:
        for name, parameter in term.parameters.items():
            given = by_id[id(parameter)]
            gradient = torch.zeros_like(parameter).double() if given is None else given.double()
            random = torch.randn(gradient.shape, generator=generator, dtype=torch.float64).to(gradient.device)
            for direction in (gradient, random):
                step = direction / direction.norm().clamp_min(1e-300)
                slope = _slope(subject, term, name, step, weight, lambda y: float((y * weights).sum()), x)
                error = abs(float((gradient * step).sum()) - slope)
                worst = max(worst, error / max(float(gradient.norm()), abs(slope), 1e-12))
    return worst


@torch.no_grad()
def _slope(
    subject: Subject,
    term: Term,
    name: str,
    step: Tensor,
    weight: Tensor,
    loss: Callable[[Tensor], float],
    x: Tensor,
) -> float:
    """The slope of a loss of the rebuilt layer's outputs along a step of one vector, by central differences."""
    values = term.values()
    norm = term.norm(values, weight) if term.detached and term.magnitude is not None else None
    ends = [
        loss(subject.outputs(x, weight + term.delta({**values, name: values[name] + sign * step}, weight, norm)))
        for sign in (_STEP, -_STEP)
    ]
    return (ends[0] - ends[1]) / (2 * _STEP)
