"""Operations that leave the values alone: casts, moves, copies, and what is trained."""

from __future__ import annotations

import copy
import io
import pickle

import torch

from tests.histories.operations import Case, Rng, in_peft_unmerged, operation, unmerged
from tests.histories.subjects import BASE, NAMES, keys
from tests.histories.writes import as_held, entered, other_values

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16]


def some_dtype(case: Case, rng: Rng) -> torch.dtype:
    """Any in which the products of the base's rows are numbers of full precision."""
    return DTYPES[int(rng.integers(3 if case.settings.row == "tiny" else 4))]


@operation(2)
def cast(case: Case, rng: Rng) -> None:
    """The whole model, in one of the ways."""
    dtype = some_dtype(case, rng)
    by_name = {torch.float32: "float", torch.bfloat16: "bfloat16", torch.float64: "double", torch.float16: "half"}
    if rng.random() < 0.5:
        getattr(case.model, by_name[dtype])()
    else:
        case.model.to("cpu", dtype)
    case.shadow.cast(dtype)


@operation()
def cast_and_back(case: Case, rng: Rng) -> None:
    """Twice, with or without a pass between."""
    before, dtype = case.shadow.dtype, some_dtype(case, rng)
    case.model.to(dtype)
    case.shadow.cast(dtype)
    if rng.random() < 0.5:
        with torch.no_grad():
            case.model(case.inputs(rng))
    case.model.to(before)
    case.shadow.cast(before)


@operation(1, unmerged)
def cast_base_layers(case: Case, rng: Rng) -> None:
    """The bases alone; their adapters are not notified."""
    dtype = torch.float32 if case.shadow.dtype == torch.bfloat16 else torch.bfloat16
    if case.shadow.dtype == torch.float64:
        return
    for name in NAMES:
        case.layer(name).base_layer.to(dtype)
    case.shadow.cast(dtype)


@operation()
def move(case: Case, rng: Rng) -> None:
    """To where it is."""
    case.model.cpu() if rng.random() < 0.5 else case.model.to("cpu")


@operation(1, unmerged)
def empty_and_load(case: Case, rng: Rng) -> None:
    """To the meta device, to memory without values, and all values from a state dict."""
    names = case.shadow.names()
    values = as_held(case, other_values(case, rng, names))
    state = {key: values[name].clone() for name, key in keys(case.model, names).items()}
    case.model.to("meta")
    case.model.to_empty(device="cpu")
    case.model.load_state_dict(state)
    case.shadow.gradients.clear()
    case.model.zero_grad()
    entered(case, values)


@operation(1, unmerged)
def move_to_meta_and_assign(case: Case, rng: Rng) -> None:
    """To the meta device, and all values from a state dict that is assigned."""
    names = case.shadow.names()
    values = as_held(case, other_values(case, rng, names))
    state = {key: values[name].clone() for name, key in keys(case.model, names).items()}
    case.model.to("meta")
    case.model.load_state_dict(state, assign=True)
    case.model.to("cpu")
    case.shadow.gradients.clear()
    case.model.zero_grad()
    entered(case, values)


@operation(2)
def copy_model(case: Case, rng: Rng) -> None:
    """`deepcopy`, `pickle` or `torch.save`; the history goes on with the copy or the original."""
    way = int(rng.integers(3))
    if way == 0:
        other = copy.deepcopy(case.model)
    elif way == 1:
        other = pickle.loads(pickle.dumps(case.model))
    else:
        file = io.BytesIO()
        torch.save(case.model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    shadow = case.shadow.copy()
    shadow.gradients.clear()  # torch copies no gradients of parameters
    if rng.random() < 0.5:
        case.left.append((other, shadow))
    else:
        case.left.append((case.model, case.shadow))
        case.model, case.shadow = other, shadow
    del case.left[:-2]


@operation(2)
def freeze(case: Case, rng: Rng) -> None:
    """Some are trained from now on, the others not."""
    names = [name for name in case.shadow.names() if name.rpartition(".")[2] not in BASE]
    if rng.random() < 0.3 and not case.shadow.is_merged:
        names = case.shadow.names()
    trained = set(case.some(rng, names))
    for name in case.shadow.names():
        case.parameter(name).requires_grad_(name in trained)
    case.shadow.trained = trained


@operation(1, in_peft_unmerged)
def freeze_through_peft(case: Case, rng: Rng) -> None:
    """The adapter in inference mode, or trained."""
    inference = bool(rng.random() < 0.5)
    case.model.set_adapter("default", inference_mode=inference)
    vectors = {name for name in case.shadow.names() if name.rpartition(".")[2] not in BASE}
    case.shadow.trained = case.shadow.trained - vectors if inference else case.shadow.trained | vectors
