"""Puts an arm's method into a backbone, and its trainable parameters into groups."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    RandLoraConfig,
    UniLoraConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors import safe_open
from torch import nn

from benchmarks.quality.grid import Arm, Rates
from dvora import DVoRAConfig


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
        biases = [parameter for name, parameter in backbone.named_parameters() if name.endswith("bias")]
        for bias in biases:
            bias.requires_grad_(True)
        return backbone
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = get_peft_model(backbone, _CONFIGS[arm.method](arm, layers, seed))
    if arm.vectors == "bfloat16":
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
    return model


def magnitude_only(layers: str, **options: Any) -> DVoRAConfig:
    """DVoRA with nothing trained but the magnitudes of the layers that a regular expression matches."""
    return DVoRAConfig(r=1, target_modules=layers, magnitude_modules=layers, **options)


def groups(model: nn.Module, head: nn.Module | None, rates: Rates, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for AdamW: the adapter, its magnitude if that has a rate of its own, and the head."""
    members: dict[str, list[nn.Parameter]] = {"adapter": [], "magnitude": [], "head": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            own = rates.magnitude is not None and ("dvora_magnitude" in name or "lora_magnitude" in name)
            members["magnitude" if own else "adapter"].append(parameter)
    members["head"] = [] if head is None else list(head.parameters())
    return [
        {
            "params": parameters,
            "lr": getattr(rates, group),
            # Decay would pull the rows of the weights towards zero, not towards the pretrained model.
            "weight_decay": 0.0 if group == "magnitude" else weight_decay,
        }
        for group, parameters in members.items()
        if parameters
    ]


SEEDED = ("vera_A", "vera_B", "randlora_A", "randlora_B")
"""Parts of the names of tensors that PEFT saves though they come from a seed."""


def saved_bytes(model: nn.Module, folder: Path) -> dict[str, int]:
    """Size of what has to be saved: PEFT's file, or the trained parameters.

    Returns:
        `saved_bytes`; how many of them are of matrices that a seed would give (`seeded_bytes`); and what is left
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


def _targets(arm: Arm, layers: Mapping[str, str]) -> str:
    return "all-linear" if arm.layers == "all" else layers[arm.layers]


def _dvora(arm: Arm, layers: Mapping[str, str], seed: int) -> PeftConfig:
    assert arm.r is not None
    # Rows of arms that name no kind of matrices were made when this was the default.
    options = {"projection_init": "kaiming_uniform", **arm.options}
    return DVoRAConfig(r=arm.r, target_modules=_targets(arm, layers), projection_seed=seed, **options)


def _magnitude(arm: Arm, layers: Mapping[str, str], seed: int) -> PeftConfig:
    return magnitude_only(f"{layers['attention']}|{layers['feed_forward']}", **arm.options)


def _vera(arm: Arm, layers: Mapping[str, str], seed: int) -> PeftConfig:
    return VeraConfig(r=arm.r, target_modules=_targets(arm, layers), projection_prng_key=seed, **arm.options)


def _lora(arm: Arm, layers: Mapping[str, str], seed: int) -> PeftConfig:
    assert arm.r is not None
    return LoraConfig(
        r=arm.r,
        lora_alpha=2 * arm.r,
        target_modules=_targets(arm, layers),
        use_dora=arm.method == "dora",
        **arm.options,
    )


def _ia3(arm: Arm, layers: Mapping[str, str], seed: int) -> PeftConfig:
    """(IA)3 where its authors put it, or, where the grid names no such layers, on the outputs of all linear layers."""
    if "ia3" not in layers:
        return IA3Config(target_modules="all-linear", feedforward_modules=[], **arm.options)
    return IA3Config(target_modules=layers["ia3"], feedforward_modules=layers["ia3_feed_forward"], **arm.options)


def _vblora(arm: Arm, layers: Mapping[str, str], seed: int) -> PeftConfig:
    assert arm.r is not None
    return VBLoRAConfig(r=arm.r, target_modules=_targets(arm, layers), **arm.options)


def _unilora(arm: Arm, layers: Mapping[str, str], seed: int) -> PeftConfig:
    assert arm.r is not None
    return UniLoraConfig(r=arm.r, target_modules=_targets(arm, layers), proj_seed=seed, **arm.options)


def _randlora(arm: Arm, layers: Mapping[str, str], seed: int) -> PeftConfig:
    assert arm.r is not None
    return RandLoraConfig(r=arm.r, target_modules=_targets(arm, layers), projection_prng_key=seed, **arm.options)


_CONFIGS: dict[str, Callable[[Arm, Mapping[str, str], int], PeftConfig]] = {
    "dvora": _dvora,
    "magnitude": _magnitude,
    "vera": _vera,
    "lora": _lora,
    "dora": _lora,
    "ia3": _ia3,
    "vblora": _vblora,
    "unilora": _unilora,
    "randlora": _randlora,
}
