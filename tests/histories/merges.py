"""Operations that merge, and what comes while something is merged."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import dvora
from tests.histories.checks import check_outputs, check_values, drawn_like
from tests.histories.operations import (
    OUTPUTS,
    Case,
    MismatchError,
    Rng,
    check_close,
    in_peft,
    in_peft_unmerged,
    is_plain,
    operation,
)
from tests.histories.subjects import NAMES, keys
from tests.histories.writes import as_held, base_names, entered, other_values, vector_names


@contextmanager
def roundings_taken() -> Iterator[None]:
    """Without the warning of a merge into half precision."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dvora.MergePrecisionWarning)
        yield


def is_merged(case: Case) -> bool:
    """Something is merged."""
    return case.shadow.is_merged


@operation(2, in_peft_unmerged)
def merge(case: Case, rng: Rng) -> None:
    """All layers."""
    with roundings_taken():
        case.model.merge_adapter()
    case.shadow.merge(*NAMES)


@operation(2, is_merged)
def unmerge(case: Case, rng: Rng) -> None:
    """All layers."""
    case.model.unmerge_adapter()
    case.shadow.unmerge(*NAMES)


@operation(1, in_peft_unmerged)
def merge_for_a_while(case: Case, rng: Rng) -> None:
    """`dvora.merged`, which is for evaluation."""
    case.model.eval()
    case.shadow.training = False
    with roundings_taken(), dvora.merged(case.model):
        case.shadow.merge(*NAMES)
        try:
            check_values(case.model, case.shadow)
            check_outputs(case, rng)
        finally:
            case.shadow.unmerge(*NAMES)


@operation(1, in_peft_unmerged)
def train_while_merged_for_a_while(case: Case, rng: Rng) -> None:
    """Vectors get gradients, or there is a word: no training of nothing."""
    case.model.eval()
    case.shadow.training = False
    vectors = [name for name in vector_names(case) if name in case.shadow.trained]
    x = case.inputs(rng).clone().requires_grad_()
    with roundings_taken(), dvora.merged(case.model):
        try:
            case.model.train()
            found = torch.autograd.grad(case.model(x).sum(), [x, *map(case.parameter, vectors)], allow_unused=True)
        finally:
            case.model.eval()
    if vectors and all(gradient is None for gradient in found[1:]):
        raise MismatchError("a pass in training mode within dvora.merged gave no vector a gradient, without a word")


@operation(1, is_plain)
def merge_to_original_layer(case: Case, rng: Rng) -> None:
    """A layer of the base's own class."""
    name = NAMES[int(rng.integers(3))]
    x = drawn_like(rng, (3, case.settings.sizes[name][0]), case.shadow.dtype)
    with roundings_taken():
        layer = case.layer(name).merge_to_original_layer()
    expected = case.shadow.of_layer(name).outputs(x)
    check_close(layer(x), expected, OUTPUTS[case.shadow.coarsest], f"outputs of the merged layer {name}")


@operation(1, in_peft_unmerged)
def merge_what_is_too_large(case: Case, rng: Rng) -> None:
    """One layer's strength takes the merged values out of the dtype's range: no layer is merged."""
    name = NAMES[int(rng.integers(3))]
    strength = case.layer(name).strength("default")
    before = strength.clone()
    # Beyond what a tensor of the weight's dtype holds, not beyond the strength's own.
    strength.fill_(1e38 if case.shadow.dtype != torch.float64 else 1e308)
    try:
        with roundings_taken():
            case.model.merge_adapter()
    except ValueError:
        pass
    else:
        held = [case.parameter(f"{name}.weight").isfinite().all() for name in NAMES]
        case.model.unmerge_adapter()
        if not all(held):
            raise MismatchError("merge_adapter put values that are not finite into a weight")
    finally:
        strength.copy_(before)


@operation(1, is_merged)
def load_vectors_while_merged(case: Case, rng: Rng) -> None:
    """Into the adapter that is merged: what is merged stays, and the new ones are there after unmerging."""
    names = vector_names(case)
    values = as_held(case, other_values(case, rng, names))
    case.model.load_state_dict({key: values[name] for name, key in keys(case.model, names).items()}, strict=False)
    entered(case, values)


@operation(2, is_merged)
def load_base_while_merged(case: Case, rng: Rng) -> None:
    """The base's own values, with or without vectors: then they are the base, and the adapter is on them."""
    names = case.shadow.names() if rng.random() < 0.5 else base_names(case)
    values = as_held(case, other_values(case, rng, names))
    case.model.load_state_dict({key: values[name] for name, key in keys(case.model, names).items()}, strict=False)
    entered(case, values)
    case.shadow.unmerge(*NAMES)
    if any(case.layer(name).merged for name in NAMES):
        case.shadow.merge(*NAMES)


@contextmanager
def saved_adapter(case: Case, values: dict[str, Tensor]) -> Iterator[str]:
    """A folder with the adapter, but with these vectors."""
    with tempfile.TemporaryDirectory() as folder:
        case.model.save_pretrained(folder)
        path = Path(folder) / "adapter_model.safetensors"
        written = keys(case.model, list(values))
        by_key = {key.replace(".default", ""): values[name].contiguous() for name, key in written.items()}
        assert by_key.keys() == load_file(path).keys()
        save_file(by_key, path)
        yield folder


@operation(2, in_peft)
def load_adapter_of_the_same_name(case: Case, rng: Rng) -> None:
    """From a folder, also while the adapter is merged: then it serves the loaded one, or refuses."""
    values = as_held(case, other_values(case, rng, vector_names(case)))
    with saved_adapter(case, values) as folder:
        case.model.load_adapter(folder, "default", is_trainable=True)
    entered(case, values)
    if case.shadow.is_merged:
        case.shadow.unmerge(*NAMES)
        if any(case.layer(name).merged for name in NAMES):
            case.shadow.merge(*NAMES)


@operation(1, in_peft)
def hotswap(case: Case, rng: Rng) -> None:
    """Other values over those of the adapter."""
    values = as_held(case, other_values(case, rng, vector_names(case)))
    with saved_adapter(case, values) as folder:
        dvora.hotswap_adapter(case.model, folder)
    entered(case, values)


@operation(1, in_peft_unmerged)
def set_strength(case: Case, rng: Rng) -> None:
    """Of all layers or one."""
    strength = [0.0, 0.5, 1.0, 1.5][int(rng.integers(4))]
    names = list(NAMES) if rng.random() < 0.5 else [NAMES[int(rng.integers(3))]]
    case.model.base_model.set_strength(dict.fromkeys(names, strength), "default")
    for name in names:
        case.shadow.layers[name].strength = strength


@operation(1, in_peft_unmerged)
def disable_for_a_while(case: Case, rng: Rng) -> None:
    """`disable_adapter`: the base alone."""
    base = case.shadow.copy()
    for layer in base.layers.values():
        layer.strength = 0.0
    x = case.inputs(rng)
    with case.model.disable_adapter(), torch.set_grad_enabled(bool(rng.random() < 0.5)):
        check_close(case.model(x), base.outputs(x), OUTPUTS[base.coarsest], "outputs with adapters disabled")
    case.shadow.trained |= set(vector_names(case))  # PEFT's way to enable an adapter again
