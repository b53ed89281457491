"""Adapters of every method on tiny models, with values as if they had been trained, saved as PEFT saves them."""

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, VeraConfig, get_peft_model
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from dvora import DVoRAConfig

CLASSES = {
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "CAUSAL_LM": AutoModelForCausalLM,
    "FEATURE_EXTRACTION": AutoModel,
    None: AutoModel,
}
METHODS = ("dvora", "vera", "lora", "dora")


def config_of(method: str, rank: int, **settings: Any) -> Any:
    settings = {"r": rank, "target_modules": "all-linear", **settings}
    if method == "dvora":
        return DVoRAConfig(**settings)
    if method == "vera":
        return VeraConfig(**settings)
    return LoraConfig(use_dora=method == "dora", **settings)


def adapted(
    base: Path, method: str, rank: int = 4, task_type: str | None = None, classes: int = 3, **settings: Any
) -> PeftModel:
    """An adapted model of the folder, its trained parameters moved."""
    options = {"num_labels": classes} if task_type in ("SEQ_CLS", "TOKEN_CLS") else {}
    with torch.random.fork_rng(), warnings.catch_warnings():
        torch.manual_seed(0)
        # PEFT asks for flags by old names; transformers reports the new head.
        warnings.simplefilter("ignore")
        model = CLASSES[task_type].from_pretrained(base, **options)
        model = get_peft_model(model, config_of(method, rank, task_type=task_type, **settings))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def save(base: Path, folder: Path, method: str = "dvora", **settings: Any) -> Path:
    """The folder of such a model's adapter."""
    adapted(base, method, **settings).save_pretrained(folder)
    return folder


def trained_parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
