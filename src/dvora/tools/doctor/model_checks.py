"""Checks of the whole model: what is called, what gets a gradient, merging, batches of several adapters."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from ...weight import MergePrecisionWarning
from ..dense_rebuild import Subject
from .findings import Finding, within_limit
from .layer_checks import TOLERANCES
from .watched import Inputs, Loss, called, distance, restored, tensor_of, tensors_of

_PERTURBATION = 0.01
_NO_GRADIENT = "an autograd kernel was not registered"
"""In torch's warning when an operator without a gradient is differentiated."""


def calls(every: tuple[Subject, ...], seen: Mapping[str, Tensor]) -> Finding:
    """Layers that were adapted and did not run."""
    never = tuple(subject.name for subject in every if subject.name not in seen)
    figures = {"layers": float(len(every)), "called": float(len(every) - len(never))}
    if not never:
        return Finding("calls", "pass", f"all {len(every)} adapted layers were called", figures=figures)
    return Finding(
        "calls",
        "fail",
        f"{len(never)} of {len(every)} adapted layers were never called, first {never[0]}",
        "leave them out (target_modules, exclude_modules), or give inputs that reach them, as experts may need",
        figures,
        never,
    )


def finite_parameters(model: nn.Module, every: tuple[Subject, ...]) -> Finding:
    """Trained parameters that are not finite."""
    own = _trained(model, every)
    bad = tuple(name for name, parameter in own.items() if not bool(parameter.isfinite().all()))
    if not bad:
        return Finding("values", "pass", f"all values of {len(own)} trained tensors are finite")
    return Finding(
        "values",
        "fail",
        f"{len(bad)} of {len(own)} trained tensors hold values that are not finite, first {bad[0]}",
        "training diverged: go back to a checkpoint and lower the learning rate",
        layers=bad,
    )


def received(model: nn.Module, inputs: Inputs, every: tuple[Subject, ...], loss: Loss | None) -> Finding:
    """Trained parameters that no gradient reaches, a small step away from where they are.

    At the start of training some gradients are zero by design: lambda_d's, and those of LoRA's A.
    """
    with restored(model, values=True):
        own = _trained(model, every)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in own.values():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32).to(parameter.device)
                parameter.add_((_PERTURBATION * noise).to(parameter.dtype)).requires_grad_(True)
        for subject in every:
            subject.make_differentiable()
        with torch.enable_grad(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            _loss(called(model, inputs), loss, generator).backward()
        without = tuple(name for name, parameter in own.items() if not _has_gradient(parameter))
    stops = [str(each.message) for each in caught if _NO_GRADIENT in str(each.message)]
    if stops:
        return Finding(
            "gradients received",
            "fail",
            f"gradients end at an operator that has none: {stops[0].partition(': an')[0]}",
            "load the model again and train it before it is evaluated: bitsandbytes repacks 4-bit weights in the first "
            "evaluation on a CPU, and what lies before them gets no gradient from then on",
        )
    if not without:
        return Finding("gradients received", "pass", f"all {len(own)} trained tensors get a gradient")
    return Finding(
        "gradients received",
        "fail",
        f"{len(without)} of {len(own)} trained tensors get no gradient, first {without[0]}",
        "what is not reached is not trained: look for a detach, a branch that is off, or layers that are not called",
        layers=without,
    )


def merging(model: PeftModel, inputs: Inputs, every: tuple[Subject, ...], adapted: Tensor) -> Finding:
    """The outputs of the model with its adapter merged into the weights, against those of the adapted model."""
    name = "merge"
    if any(subject.layout is None for subject in every):
        return Finding(name, "skip", "the base is quantised: a merge would quantise it anew")
    merges: Any = model
    with restored(model, values=True), warnings.catch_warnings():
        # The finding "merge rounding" reports it.
        warnings.simplefilter("ignore", MergePrecisionWarning)
        try:
            merges.merge_adapter()
            with torch.no_grad():
                error = distance(tensor_of(called(model, inputs)), adapted)
        except (TypeError, ValueError, NotImplementedError) as problem:
            return Finding(name, "skip", f"not possible here: {problem}")
        finally:
            if any(subject.layer.merged for subject in every):
                merges.unmerge_adapter()
    widest = max((subject.dtype for subject in every), key=lambda dtype: TOLERANCES[dtype])
    return within_limit(
        name,
        error,
        10 * TOLERANCES[widest],
        "outputs of the merged model differ by",
        "do not ship the merged model: keep the adapter, or merge into a float32 copy of the base",
    )


def mixed_batch(model: PeftModel, inputs: Inputs, every: tuple[Subject, ...], adapted: Tensor) -> Finding:
    """A batch whose rows have the adapter and the base by turns, against the rows of both."""
    name = "mixed batch"
    if any(isinstance(subject.layer, LoraLayer) and term.magnitude for subject in every for term in subject.terms):
        # It would refuse in the middle of a pass, and leave its hooks behind.
        return Finding(name, "skip", "PEFT's DoRA takes no batches of several adapters")
    if len(model.active_adapters) != 1:
        return Finding(name, "skip", "several adapters are active at once")
    rows = [model.active_adapters[0] if row % 2 else "__base__" for row in range(len(adapted))]
    if len(rows) < 2:
        return Finding(name, "skip", "the inputs have a single row")
    try:
        with torch.no_grad():
            mixed = tensor_of(called(model, inputs, adapter_names=rows))
            with model.disable_adapter():
                base = tensor_of(called(model, inputs))
    except (TypeError, ValueError, NotImplementedError, AttributeError) as problem:
        return Finding(name, "skip", f"not possible here: {str(problem).splitlines()[0]}")
    expected = torch.stack([adapted[row] if row % 2 else base[row] for row in range(len(rows))])
    return within_limit(
        name,
        distance(mixed, expected),
        10 * TOLERANCES[adapted.dtype],
        "rows of a mixed batch differ from single ones by",
        "serve one adapter at a time until it is mended",
    )


def _trained(model: nn.Module, every: tuple[Subject, ...]) -> dict[str, nn.Parameter]:
    """What the model trains; of one that was loaded to be used, the vectors of its adapter."""
    named = {name.removeprefix("base_model.model."): each for name, each in model.named_parameters()}
    trained = {name: each for name, each in named.items() if each.requires_grad}
    if trained:
        return trained
    own = {id(each) for subject in every for term in subject.terms for each in term.parameters.values()}
    return {name: each for name, each in named.items() if id(each) in own}


def _has_gradient(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None and bool(parameter.grad.isfinite().all()) and bool(parameter.grad.any())


def _loss(outputs: Any, loss: Loss | None, generator: torch.Generator) -> Tensor:
    if loss is not None:
        return loss(outputs)
    own = outputs.get("loss") if isinstance(outputs, Mapping) else None
    if own is not None:
        found: Tensor = own
        return found
    weighed = [
        (each.float() * torch.randn(each.shape, generator=generator).to(each.device)).sum()
        for each in tensors_of(outputs)
    ]
    return torch.stack(weighed).sum()
