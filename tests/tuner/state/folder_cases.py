"""Sound adapter folders of several kinds, the models they are loaded onto."""

from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from dvora import DVoRAConfig
from tests.tuner.tiny import LAYERS, MODELS, outputs, train_vectors

OWN = "mine"
"""The adapter that is there before another is loaded beside it."""


class Case(NamedTuple):
    """A base model and the settings of the adapter that is saved for it."""

    model: str
    settings: dict[str, object]
    beside: bool = True
    """Whether PEFT allows it beside another adapter."""

    def base(self) -> nn.Module:
        return MODELS[self.model]()


class Sound(NamedTuple):
    """An undamaged folder and what loading it gives."""

    case: Case
    folder: Path
    state: dict[str, Tensor]
    outputs: Tensor


CASES = {
    "patterns": Case(
        "mlp",
        {
            "r": 6,
            "alpha": 3.5,
            "target_modules": LAYERS["mlp"],
            "rank_pattern": {"lin1": 4},
            "alpha_pattern": {"lin0": 2.0},
            "direction": "weight",
            "projection_init": "kaiming_uniform",
            "save_projection": True,
        },
    ),
    # PEFT wants an adapter that trains biases to be the only one.
    "biases": Case(
        "mlp", {"r": 3, "target_modules": "lin[01]", "bias": "dvora_only", "dvora_dropout": 0.1}, beside=False
    ),
    "module": Case(
        "mlp", {"r": 5, "target_modules": ["lin0", "lin1"], "modules_to_save": ["lin2"], "projection_seed": 7}
    ),
    "classifier": Case(
        "bert", {"r": 6, "target_modules": ["query", "value"], "task_type": "SEQ_CLS", "layers_to_transform": [1]}
    ),
}


def saved(case: Case, folder: Path) -> Sound:
    """Save a trained adapter."""
    model = get_peft_model(case.base(), DVoRAConfig(**case.settings)).eval()
    train_vectors(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.linspace(-0.1, 0.2, parameter.numel()).view_as(parameter))
    model.save_pretrained(folder)
    return Sound(case, folder, get_peft_model_state_dict(model), adapted_outputs(model))


def adapted_outputs(model: nn.Module) -> Tensor:
    """Of the adapted base, whatever PEFT has wrapped around it for a task."""
    return outputs(model.get_base_model() if isinstance(model, PeftModel) else model)


def with_own_adapter(case: Case) -> PeftModel:
    """The base with a trained adapter on the same layers."""
    settings = {name: case.settings[name] for name in ("target_modules", "task_type") if name in case.settings}
    model = get_peft_model(case.base(), DVoRAConfig(r=3, **settings), OWN).eval()
    train_vectors(model, OWN, seed=1)
    return model
