"""Adapters of many kinds, in a model and as it saves them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dvora import DVoRAConfig
from tests.peft.layer_cases import CASES as LAYER_TYPES
from tests.peft.tiny import LAYERS, MODELS, train_vectors

GROUPS = 3
"""Of lambda_d, where there are several: some layers have a number of inputs that it divides, most do not."""
by_groups = pytest.mark.parametrize("groups", [1, GROUPS], ids=["one group", "groups"])


class Kind(NamedTuple):
    """A base and the settings of its adapter."""

    base: Callable[[], nn.Module]
    settings: dict[str, Any]

    def fresh(self, **settings: Any) -> PeftModel:
        """The base with an adapter that was not trained."""
        return get_peft_model(self.base(), DVoRAConfig(**{**self.settings, **settings})).eval()

    def by_groups(self, groups: int) -> "Kind":
        """The same with so many groups of lambda_d."""
        return self._replace(settings={**self.settings, "lambda_d_groups": groups})

    def trained(self, seed: int = 0, **settings: Any) -> PeftModel:
        """The same with vectors, heads, biases and tokens as if trained."""
        model = self.fresh(**settings)
        train_vectors(model, seed=seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad and parameter.is_floating_point():
                    parameter.add_(torch.linspace(-0.1, 0.1 + 0.1 * seed, parameter.numel()).view_as(parameter))
        return model


def saved(model: PeftModel, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def mlp(**settings: Any) -> Kind:
    return Kind(MODELS["mlp"], {"r": 4, "target_modules": LAYERS["mlp"], **settings})


_ONE_GROUP = {
    **{name: Kind(case.base, {"r": 5, **case.settings}) for name, case in LAYER_TYPES.items()},
    **{f"{name} model": Kind(MODELS[name], {"r": 6, "target_modules": LAYERS[name]}) for name in MODELS},
}
KINDS = {
    **_ONE_GROUP,
    **{f"{name}, groups": kind.by_groups(GROUPS) for name, kind in _ONE_GROUP.items()},
    "patterns": mlp(alpha=3.5, rank_pattern={"lin1": 7}, alpha_pattern={"lin0": 2.0}, direction="weight"),
    "scales in one shape": Kind(
        MODELS["bert"],
        {"r": 3, "target_modules": ["query"], "alpha_pattern": {"layer.0.attention.self.query": 2.0}},
    ),
    "another seed": mlp(projection_seed=7),
    "magnitudes": mlp(target_modules=["lin1"], magnitude_modules=["lin0", "lin2"]),
    "groups": mlp(lambda_d_groups=4, rank_pattern={"lin1": 7}, alpha_pattern={"lin0": 2.0}, projection_seed=7),
    "groups and magnitudes": mlp(target_modules=["lin1"], magnitude_modules=["lin0", "lin2"], lambda_d_groups=5),
    "groups of a stack": Kind(
        LAYER_TYPES["experts (E, in, out)"].base,
        {"r": 5, "lambda_d_groups": 3, **LAYER_TYPES["experts (E, in, out)"].settings},
    ),
    "own biases": mlp(bias="dvora_only"),
    "all biases": Kind(MODELS["bert"], {"r": 3, "target_modules": ["query"], "bias": "all", "task_type": "SEQ_CLS"}),
    "head": mlp(target_modules=["lin0", "lin1"], modules_to_save=["lin2"]),
    "classifier": Kind(MODELS["bert"], {"r": 3, "target_modules": LAYERS["bert"][:2], "task_type": "SEQ_CLS"}),
    "tokens": Kind(MODELS["llama"], {"r": 3, "target_modules": ["q_proj"], "trainable_token_indices": [5, 3]}),
    "embeddings": Kind(MODELS["llama"], {"r": 3, "target_modules": ["embed_tokens", "q_proj"]}),
    "groups of an embedding": Kind(
        MODELS["llama"], {"r": 3, "lambda_d_groups": 3, "target_modules": ["embed_tokens", "q_proj"]}
    ),
}


def bits(tensor: Tensor) -> Tensor:
    """Of float32 values."""
    return tensor.detach().contiguous().view(torch.int32)


WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def save_bert(folder: Path) -> Path:
    """Save a trained adapter of the tiny BERT."""
    config = DVoRAConfig(r=6, target_modules=LAYERS["bert"], projection_init="kaiming_uniform")
    model = get_peft_model(MODELS["bert"](), config)
    train_vectors(model)
    model.save_pretrained(folder)
    return folder


def edit_weights(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def edit_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **values}))
