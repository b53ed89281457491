"""Ctrl-C at any line of the library: afterwards the model is right."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from peft import PeftModel

import dvora
from tests.histories.checks import check_outputs, drawn_like
from tests.histories.lines import at_line
from tests.histories.merges import roundings_taken, saved_adapter
from tests.histories.operations import (
    Case,
    MismatchError,
    Rng,
    in_peft,
    in_peft_unmerged,
    is_plain,
    operation,
    unmerged,
)
from tests.histories.subjects import BASE, NAMES, VECTORS, keys
from tests.histories.writes import as_held, other_values, vector_names


def interrupted(call: Callable[[], object], line: int, files: Sequence[str] = ("",)) -> None:
    """Call, and press Ctrl-C at a line."""

    def press() -> None:
        raise KeyboardInterrupt

    try:
        with at_line(line, press, files):
            call()
    except KeyboardInterrupt:
        pass


@operation(1)
def interrupt_a_pass(case: Case, rng: Rng) -> None:
    """Recorded or not."""
    x, recorded = case.inputs(rng), bool(rng.random() < 0.5)

    def run() -> None:
        with torch.set_grad_enabled(recorded):
            case.model(x)

    interrupted(run, int(rng.integers(1, 1500)))


@operation(1, unmerged)
def interrupt_a_backward_pass(case: Case, rng: Rng) -> None:
    """Whose gradients go nowhere."""
    x = case.inputs(rng).clone().requires_grad_()
    y = case.model(x)
    interrupted(lambda: torch.autograd.grad(y.sum(), x), int(rng.integers(1, 600)))


@operation(1, unmerged)
def interrupt_a_load(case: Case, rng: Rng) -> None:
    """Every value is the old or the new one, and what is there is served."""
    names = case.shadow.names()
    values = as_held(case, other_values(case, rng, names))
    state = {key: values[name].clone() for name, key in keys(case.model, names).items()}
    interrupted(lambda: case.model.load_state_dict(state), int(rng.integers(1, 600)))
    _take_over(case, values)


@operation(1, is_plain)
def interrupt_set_parameters(case: Case, rng: Rng) -> None:
    """Likewise."""
    layer = NAMES[int(rng.integers(3))]
    of_base = [] if case.layer(layer).freeze_base_layer else [n for n in BASE if f"{layer}.{n}" in case.shadow.names()]
    values = as_held(case, other_values(case, rng, [f"{layer}.{value}" for value in (*VECTORS, *of_base)]))
    vector = torch.cat([value.flatten().to(case.shadow.vector_dtype) for value in values.values()])
    interrupted(lambda: case.layer(layer).set_parameters(vector), int(rng.integers(1, 50)))
    _take_over(case, values)


@operation(1, is_plain)
def interrupt_explicit_backward(case: Case, rng: Rng) -> None:
    """Every gradient is there or not, and the next pass is right."""
    name = NAMES[int(rng.integers(3))]
    layer = case.layer(name)
    if not layer.training:
        return
    x = drawn_like(rng, (5, case.settings.sizes[name][0]), case.shadow.dtype)
    y = layer(x)
    interrupted(lambda: layer.backward(torch.ones_like(y)), int(rng.integers(1, 700)))
    case.model.zero_grad()
    case.shadow.gradients.clear()


@operation(3, in_peft_unmerged)
def interrupt_merge(case: Case, rng: Rng) -> None:
    """Outputs are right, and unmerging gives the base its own bits."""
    with roundings_taken():
        interrupted(case.model.merge_adapter, *_moment(rng, 1500, 400))
    _put_back(case, rng)


@operation(3, in_peft)
def interrupt_unmerge(case: Case, rng: Rng) -> None:
    """Likewise."""
    if not case.shadow.is_merged:
        with roundings_taken():
            case.model.merge_adapter()
        case.shadow.merge(*NAMES)
    interrupted(case.model.unmerge_adapter, int(rng.integers(1, 170)))
    _put_back(case, rng)


@operation(3, in_peft_unmerged)
def interrupt_merged(case: Case, rng: Rng) -> None:
    """`dvora.merged`, on its way in or out."""
    case.model.eval()
    case.shadow.training = False
    x = case.inputs(rng)

    def run() -> None:
        with roundings_taken(), dvora.merged(case.model), torch.no_grad():
            case.model(x)

    interrupted(run, *_moment(rng, 2000, 600))
    _put_back(case, rng)


@operation(2, in_peft_unmerged)
def interrupt_load_adapter(case: Case, rng: Rng) -> None:
    """Every vector of the adapter is the old or the new one."""
    values = as_held(case, other_values(case, rng, vector_names(case)))
    swaps = bool(rng.random() < 0.5)
    with saved_adapter(case, values) as folder:
        load = dvora.hotswap_adapter if swaps else PeftModel.load_adapter
        options = {} if swaps else {"is_trainable": True}
        interrupted(lambda: load(case.model, folder, "default", **options), int(rng.integers(1, 750)))
    _take_over(case, values)


@operation(2, in_peft_unmerged)
def interrupt_a_new_adapter(case: Case, rng: Rng) -> None:
    """A name is absent, or whole: it can be added again or be deleted, and the one that was there is right."""
    config = dvora.DVoRAConfig(r=2, target_modules=["first", "last"], projection_seed=5)
    was_active, was_trained = case.model.active_adapter, set(case.shadow.trained)
    interrupted(lambda: case.model.add_adapter("another", config), int(rng.integers(1, 3100)))
    if "another" in case.model.peft_config:
        case.model.delete_adapter("another")
    left = [name for name in NAMES if "another" in getattr(case.layer(name), "dvora_magnitude", {})]
    if left:
        raise MismatchError(f"an adapter whose addition was interrupted is left in {left}, though its name is absent")
    case.model.add_adapter("another", config)
    case.model.delete_adapter("another")
    case.model.set_adapter(was_active)
    for name in case.shadow.names():
        case.parameter(name).requires_grad_(name in was_trained)


def _moment(rng: Rng, lines: int, lines_that_merge: int) -> tuple[int, Sequence[str]]:
    """Any line, or one of those that merge: most others prepare it."""
    if rng.random() < 0.3:
        return int(rng.integers(1, lines)), ("",)
    return int(rng.integers(1, lines_that_merge)), ("tuner/merging", "tuner/layers/mergeable", "weight/merge")


def _take_over(case: Case, values: dict[str, torch.Tensor]) -> None:
    """Enter which of the values were written."""
    for name, value in values.items():
        held = case.parameter(name).detach()
        if torch.equal(held, value):
            case.shadow[name] = value
        elif not torch.equal(held.double(), case.shadow[name]):
            raise MismatchError(f"{name} is neither the old nor the new value after an interruption")


def _put_back(case: Case, rng: Rng) -> None:
    """Whatever is merged now: outputs are right, and unmerging restores everything."""
    for name in NAMES:
        case.shadow.merge(name) if case.layer(name).merged else case.shadow.unmerge(name)
    check_outputs(case, rng)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already unmerged")
        case.model.unmerge_adapter()
    case.shadow.unmerge(*NAMES)
