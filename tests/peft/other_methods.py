"""Adapters of LoRA, (IA)3 and RoAd on the tiny models, saved by PEFT."""

from pathlib import Path
from typing import Any

import torch
from peft import IA3Config, LoraConfig, RoadConfig, get_peft_model
from torch import nn

from tests.peft.kinds import saved


def other(base: nn.Module, folder: Path, method: str, seed: int = 0, **settings: Any) -> Path:
    """An adapter as if it was trained."""
    config = {
        "lora": lambda: LoraConfig(init_lora_weights=False, **settings),
        "ia3": lambda: IA3Config(init_ia3_weights=False, **{"feedforward_modules": [], **settings}),
        "road": lambda: RoadConfig(init_weights=False, **{"group_size": 8, **settings}),
    }[method]()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = get_peft_model(base, config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and "classifier" in name:
                    parameter.add_(torch.randn_like(parameter))
    return saved(model, folder)
