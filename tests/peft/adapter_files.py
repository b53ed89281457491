"""A saved adapter, and edits of its files."""

import json
from collections.abc import Callable
from pathlib import Path

from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from dvora import DVoRAConfig
from tests.peft.tiny import LAYERS, MODELS, train_vectors

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def save_bert(folder: Path) -> Path:
    """Save a trained adapter of the tiny BERT, with its projections."""
    config = DVoRAConfig(r=6, target_modules=LAYERS["bert"], projection_init="kaiming_uniform", save_projection=True)
    model = get_peft_model(MODELS["bert"](), config)
    train_vectors(model)
    model.save_pretrained(folder)
    return folder


def edit_weights(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of the file in place."""
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def edit_config(folder: Path, **values: object) -> None:
    """Overwrite settings."""
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **values}))
