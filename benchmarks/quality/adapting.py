"""Puts an arm's method into a backbone, groups what it trains, and weighs what it saves."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from torch import nn

from benchmarks.methods import peft_config
from benchmarks.parts import with_parts
from benchmarks.quality.diagonals import with_diagonals
from benchmarks.quality.grid import Arm, Rates
from benchmarks.quality.grouped import with_groups

SEEDED = ("vera_A", "vera_B", "randlora_A", "randlora_B", "shira_indices", "tinylora_A", "tinylora_B", "tinylora_P")
"""Parts of the names of tensors that PEFT saves though they come from a seed, or (TinyLoRA's A and B) from the base."""

MAGNITUDES = ("dvora_magnitude", "lora_magnitude", ".rows")
"""Likewise of what scales rows."""


def adapted(backbone: nn.Module, arm: Arm, layers: Mapping[str, str], seed: int) -> nn.Module:
    """The backbone with the arm's method in it, its random starts drawn from the seed.

    Args:
        layers: regular expressions by name.
        seed: of the shared matrices, or of LoRA's random start.
    """
    backbone.requires_grad_(arm.method == "full")
    if arm.method == "full":
        return backbone
    if arm.method == "bitfit":
        for name, parameter in backbone.named_parameters():
            parameter.requires_grad_(name.endswith("bias"))
        return backbone
    if arm.method == "parts":
        return with_parts(backbone, rank=arm.r or 0, seed=seed, **arm.options)
    if arm.method == "grouped":
        return with_groups(backbone, rank=arm.r or 0, seed=seed, **arm.options)
    if arm.method == "diagonals":
        return with_diagonals(backbone, count=arm.r or 0, seed=seed, **arm.options)
    targets = "all-linear" if arm.layers == "all" else layers[arm.layers]
    if arm.method == "magnitude":
        targets = f"{layers['attention']}|{layers['feed_forward']}"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(backbone, peft_config(arm.method, arm.r, targets, seed, arm.options))


def groups(model: nn.Module, head: nn.Module | None, rates: Rates) -> list[dict[str, Any]]:
    """Parameter groups for AdamW: the adapter, its magnitude if that has a rate of its own, and the head."""
    members: dict[str, list[nn.Parameter]] = {"adapter": [], "magnitude": [], "head": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_magnitude = any(part in name for part in MAGNITUDES)
            members["magnitude" if is_magnitude and rates.magnitude else "adapter"].append(parameter)
    members["head"] = [] if head is None else list(head.parameters())
    return [
        {"params": parameters, "lr": getattr(rates, group), "weight_decay": 0.0}
        for group, parameters in members.items()
        if parameters
    ]


def saved_bytes(model: nn.Module, folder: Path) -> dict[str, int]:
    """Size of what has to be saved: PEFT's file, or the trained parameters.

    Returns:
        `saved_bytes`; how many of them are of `SEEDED` (`seeded_bytes`); and what is left
        without these, with all other numbers in float16 (`smallest_bytes`).
    """
    if not isinstance(model, PeftModel):
        whole = sum(each.numel() * each.element_size() for each in model.parameters() if each.requires_grad)
        return {"saved_bytes": whole, "seeded_bytes": 0, "smallest_bytes": whole // 2}
    model.save_pretrained(str(folder))
    file = folder / "adapter_model.safetensors"
    whole, seeded, halved = file.stat().st_size, 0, 0
    with safe_open(file, "pt") as tensors:
        for name in list(tensors.keys()):
            tensor = tensors.get_tensor(name)
            if any(each in name for each in SEEDED):
                seeded += tensor.nbytes
            elif tensor.dtype == torch.float32:
                halved += tensor.nbytes // 2
    return {"saved_bytes": whole, "seeded_bytes": seeded, "smallest_bytes": whole - seeded - halved}


@torch.no_grad()
def round_to_half(model: nn.Module) -> None:
    """Give every trained parameter the values that it would have after a file in float16."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.copy_(parameter.half())
