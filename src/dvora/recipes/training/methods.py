"""The methods that a base can be trained with: what each trains of it, at which learning rates, and what it saves."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, VeraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...adapter_file.patterns import check_expressions
from ...blocks import block_lists
from ...heads import last_layer
from ...peft import DVoRAConfig
from ...training import parameter_groups, recommended_rates
from ..models.bases import TASK_TYPES, Base
from ..run_folder import HEAD_FILE
from ..settings import Group, Settings


def adapt(base: Base, settings: Settings) -> nn.Module:
    """The base with the run's method put into it; its heads are trained whole, and random starts come from the seed.

    Raises:
        ValueError: the method does not fit the model, or a setting does not fit the method.
    """
    model: nn.Module = base.model
    if settings.method == "full":
        return model
    if settings.method == "head":
        last = last_layer(model)
        assert last is not None, "checked before"
        model.requires_grad_(False)
        last.requires_grad_(True)
        return model
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        return get_peft_model(base.model, peft_config(settings, base))


def peft_config(settings: Settings, base: Base) -> PeftConfig:
    """The PEFT configuration of a method that has one; the heads are modules to train and save whole.

    Raises:
        ValueError: a setting does not fit the method or the model.
    """
    common: dict[str, Any] = {
        "r": settings.rank,
        **targets_of(settings, base),
        "modules_to_save": list(base.heads) or None,
        # PEFT has no name for images.
        "task_type": None if settings.task == "image-classification" else TASK_TYPES[settings.task],
    }
    if settings.method == "dvora":
        return DVoRAConfig(
            lambda_d_groups=settings.lambda_d_groups,
            alpha=settings.alpha,
            projection_seed=settings.projection_seed,
            dvora_dropout=settings.dropout,
            **common,
        )
    if settings.method == "vera":
        if settings.alpha is not None:
            raise ValueError("alpha is set, but vera has none; its scale is in its vectors")
        return VeraConfig(projection_prng_key=settings.projection_seed, vera_dropout=settings.dropout, **common)
    alpha: Any = settings.alpha or 2 * common["r"]
    return LoraConfig(lora_alpha=alpha, lora_dropout=settings.dropout, use_dora=settings.method == "dora", **common)


def targets_of(settings: Settings, base: Base) -> dict[str, Any]:
    """PEFT's settings of the layers to adapt: the targets, where `blocks` is set those in the last blocks.

    Raises:
        ValueError: the model has not so many blocks, or no list of them, or the targets name nothing in them.
    """
    targets: Any = settings.targets if isinstance(settings.targets, str) else list(settings.targets)
    if settings.blocks is None:
        return {"target_modules": targets}
    lists, count = block_lists(base.model, base.heads), int(settings.blocks.removeprefix("last:"))
    if len(lists) != 1:
        names = f" ({', '.join(name for name, _ in lists)})" if lists else ""
        raise ValueError(
            f"blocks is {settings.blocks}, and the model has {len(lists)} lists of blocks{names}, where one was "
            "expected; leave blocks out, and name the layers with targets"
        )
    ((path, blocks),) = lists
    if count > len(blocks):
        raise ValueError(f"blocks is {settings.blocks}, and the model has {len(blocks)} blocks")
    indices = range(len(blocks) - count, len(blocks))
    modules = {name: module for i in indices for name, module in blocks[i].named_modules(prefix=f"{path}.{i}")}
    # PEFT takes indices beside a list of names only.
    if targets == "all-linear":
        layers = [name for name, module in modules.items() if isinstance(module, nn.Linear | Conv1D)]
        targets = sorted({name.rpartition(".")[2] for name in layers})
    elif isinstance(targets, str):
        check_expressions({"target_modules": targets}, modules, bounded=False)
        targets = [name for name in modules if re.fullmatch(targets, name)]
    if not targets:
        raise ValueError(f"targets {settings.targets!r} name no layer in the blocks {settings.blocks}")
    return {"target_modules": targets, "layers_to_transform": [*indices], "layers_pattern": path.rpartition(".")[2]}


def learning_rates(model: nn.Module, settings: Settings) -> dict[Group, float]:
    """The groups that have another learning rate than the settings' single one.

    Raises:
        ValueError: nothing is trained.
    """
    if settings.method != "dvora":
        return settings.learning_rates
    recommended = recommended_rates(model, settings.rate)
    rates: dict[Group, float] = {"magnitude": recommended["magnitude"]} if "magnitude" in recommended else {}
    return rates | settings.learning_rates


def optimizer(
    model: nn.Module, settings: Settings, heads: tuple[str, ...], rates: dict[Group, float]
) -> torch.optim.Optimizer:
    """AdamW over what is trained, with the learning rates of its groups.

    Raises:
        ValueError: a learning rate is set for a group of which nothing is trained.
    """
    if settings.method == "dvora":
        groups = parameter_groups(model, settings.rate, weight_decay=settings.weight_decay, learning_rates=rates)
        return torch.optim.AdamW([{k: v for k, v in group.items() if k != "name"} for group in groups])
    groups_of: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups_of[_is_in(name, heads)].append(parameter)
    if "head" in rates and not groups_of[True]:
        raise ValueError("learning_rates names the group 'head', of which the model trains nothing")
    rate_of = {True: rates.get("head", settings.rate), False: settings.rate}
    return torch.optim.AdamW(
        [
            {"params": parameters, "lr": rate_of[in_head], "weight_decay": settings.weight_decay}
            for in_head, parameters in groups_of.items()
            if parameters
        ]
    )


def values_at_start(model: nn.Module) -> dict[str, Tensor]:
    """What an adapter trains, before it does, when the outputs are the base's; empty where there is no adapter."""
    if not isinstance(model, PeftModel):
        return {}
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def back_to_head_alone(model: nn.Module, base: Base, start: Mapping[str, Tensor], head: nn.Linear | None) -> None:
    """Undo what was trained of an adapted model, and give it the head that was fitted to its base."""
    for name, parameter in model.named_parameters():
        if name in start:
            parameter.copy_(start[name])
    # Of the two in PEFT's wrapper this is the trained one.
    last = last_layer(base.model)
    assert last is not None
    assert head is not None
    last.load_state_dict(head.state_dict(), strict=last.bias is not None)


def save_trained(model: Any, settings: Settings, heads: tuple[str, ...], folder: Path) -> None:
    """Write what was trained: an adapter, a whole model (full), or the heads' weights (head)."""
    if settings.method != "head":
        model.save_pretrained(folder)
        return
    weights = {name: value.contiguous() for name, value in model.state_dict().items() if _is_in(name, heads)}
    save_file(weights, folder / HEAD_FILE)


def trained_parameters(model: nn.Module) -> int:
    """How many values are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _is_in(parameter: str, modules: tuple[str, ...]) -> bool:
    """Whether a parameter belongs to one of the modules, inside of PEFT's wrappers or not."""
    return any(f".{module}." in f".{parameter}" for module in modules)
