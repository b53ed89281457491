"""Checks of where training starts, and of how far it went: identity, movement, learning rates."""

import copy

import torch
from peft import PeftModel
from torch import nn

from ..dense_rebuild import Subject
from .findings import Finding, within_limit, within_limits
from .layer_checks import TOLERANCES
from .watched import Inputs, called, distance, restored, tensor_of

RUNAWAY = 0.5
"""Median relative change of a magnitude beyond which it has run away."""
FAST = 0.05
"""Learning rate of the magnitude, as a share of the median norm of a row, beyond which it will."""
_FRESH = "doctor"


def identity(model: PeftModel, inputs: Inputs) -> Finding:
    """A fresh adapter of the same configuration against the base alone."""
    name = "identity at the start"
    active = list(model.active_adapters)
    if len(active) != 1:
        return Finding(name, "skip", "several adapters are active at once")
    config = copy.deepcopy(model.peft_config[active[0]])
    config.inference_mode = False
    with restored(model):
        try:
            model.add_adapter(_FRESH, config)
        except (TypeError, ValueError, NotImplementedError) as problem:
            return Finding(name, "skip", f"no second adapter fits beside this one: {str(problem).splitlines()[0]}")
        try:
            model.set_adapter(_FRESH)
            model.eval()
            with torch.no_grad():
                started = tensor_of(called(model, inputs))
                with model.disable_adapter():
                    base = tensor_of(called(model, inputs))
        finally:
            model.set_adapter(active[0])
            model.delete_adapter(_FRESH)
    return within_limit(
        name,
        distance(started, base),
        TOLERANCES[base.dtype],
        "outputs of a fresh adapter differ from the base's by",
        "training starts from a damaged model: leave init_weights (init_lora_weights) at its default",
    )


def movement(every: tuple[Subject, ...]) -> Finding:
    """Whether the adapter is still where it started, and whether its magnitude ran away."""
    name = "movement"
    changes: dict[str, float] = {}
    moved = 0
    for subject in every:
        weight = subject.weight()
        for term in subject.terms:
            moved += term.moves(weight)
            if term.magnitude is not None:
                rows = weight.norm(dim=1)
                relative = (term.values()[term.magnitude].flatten() - rows).abs() / rows.clamp_min(1e-30)
                changes[subject.name] = float(relative.nan_to_num(float("inf")).median())
    figures = {"layers": float(len(every)), "moved": float(moved)}
    if not moved:
        return Finding(
            name,
            "warn",
            "no layer has moved from where it started: the adapter does nothing",
            "train it; after training, look whether its values are in the optimizer and its learning rates above zero",
            figures,
        )
    runaway = tuple(layer for layer, change in changes.items() if change > RUNAWAY)
    if runaway:
        worst = max(changes.values())
        return Finding(
            name,
            "fail",
            f"the magnitude ran away in {len(runaway)} of {len(changes)} layers: half of its rows changed by "
            f"{worst:.0%} or more",
            "lower the magnitude's learning rate (dvora.training.recommended_rates)",
            {**figures, "worst": worst},
            runaway,
        )
    found = f"{moved} of {len(every)} layers have moved"
    if changes:
        found += f"; median change of a row's magnitude at most {max(changes.values()):.1%}"
        figures["worst"] = max(changes.values())
    return Finding(name, "pass", found, figures=figures)


def rates(model: nn.Module, every: tuple[Subject, ...], optimizer: torch.optim.Optimizer) -> Finding:
    """Learning rates that look wrong, and trained parameters that the optimizer does not have."""
    name = "learning rates"
    by_id = {id(each): float(group["lr"]) for group in optimizer.param_groups for each in group["params"]}
    named = {each: parameter for each, parameter in model.named_parameters() if parameter.requires_grad}
    left_out = tuple(each for each, parameter in named.items() if id(parameter) not in by_id)
    if left_out:
        return Finding(
            name,
            "fail",
            f"{len(left_out)} of {len(named)} trained tensors are in no group of the optimizer, first {left_out[0]}",
            "make the optimizer after the adapter, over all that is trained (dvora.training.parameter_groups)",
            layers=left_out,
        )
    fast, slow = {}, []
    for subject in every:
        for term in subject.terms:
            for vector, parameter in term.parameters.items():
                rate = by_id.get(id(parameter))
                if rate == 0:
                    slow.append(f"{subject.name}.{vector}")
                elif rate is not None and vector == term.magnitude:
                    fast[subject.name] = rate / float(subject.weight().norm(dim=1).median().clamp_min(1e-30))
    if slow:
        return Finding(
            name,
            "warn",
            f"{len(slow)} trained tensors have a learning rate of zero, first {slow[0]}",
            "leave them out of training (train=...), or give them a rate",
            layers=tuple(slow),
        )
    if not fast:
        return Finding(name, "pass", f"all {len(named)} trained tensors have a learning rate above zero")
    return within_limits(
        name,
        fast,
        FAST,
        "the magnitude's learning rate, as a share of the median norm of a row, is",
        "take dvora.training.recommended_rates: AdamW moves every value by about its rate in each step",
        status="warn",
    )
