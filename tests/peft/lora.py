"""Adapters of LoRA on the tiny models, saved by PEFT."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from tests.peft.kinds import saved


def lora(base: nn.Module, folder: Path, seed: int = 0, **settings: Any) -> Path:
    """An adapter as if it was trained."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = get_peft_model(base, LoraConfig(init_lora_weights=False, **settings))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and "classifier" in name:
                    parameter.add_(torch.randn_like(parameter))
    return saved(model, folder)
