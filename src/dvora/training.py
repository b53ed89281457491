"""For training loops: groups with their learning rates, and whether processes agree."""

import json
from collections.abc import Mapping
from typing import Any, Literal, cast, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .adapter import DVoRAAdapter
from .checks import checked_not_negative
from .functional import Vectors
from .heads import FittedHead, fit_head
from .tensors import is_dtensor, is_partitioned
from .weight import AdaptedWeight

__all__ = [
    "AdapterSettings",
    "FittedHead",
    "check_ranks_agree",
    "fit_head",
    "parameter_groups",
    "recommended_rates",
]

Group = Literal["magnitude", "lambda_b", "lambda_d", "head"]
GROUPS: tuple[Group, ...] = get_args(Group)
"""`head` is everything trained other than the vectors: heads, token embeddings, a base that is not frozen."""
LAMBDA_RATE = 0.02
HEAD_RATE = 1e-3
MAGNITUDE_SHARE = 0.35
"""Learning rates of `recommended_rates`; the magnitude's is this share of the others' for rows of norm one."""
USUAL_SHARE = 1e-2
"""Rows below this share of the magnitudes' root mean square are ignored for the magnitude's rate."""

_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Names that engines insert into module paths."""


def parameter_groups(
    model: nn.Module,
    learning_rate: float,
    *,
    weight_decay: float = 0.0,
    learning_rates: Mapping[Group, float] | None = None,
    weight_decays: Mapping[Group, float] | None = None,
) -> list[dict[str, Any]]:
    """Every trained parameter of a model once, grouped for an optimizer of `torch.optim` or a trainer.

    Args:
        model: with `DVoRAAdapter` layers or adapted through PEFT, wrapped or not.
        learning_rate: of the groups that `learning_rates` leaves out.
        weight_decay: of the groups that `weight_decays` leaves out, except the magnitude, whose default is zero: it
            starts as the norm of its row, and decay would pull it away from there.
        learning_rates: by group: "magnitude", "lambda_b", "lambda_d", "head".
        weight_decays: likewise.

    Returns:
        One dictionary a group that is not empty: `name`, `params`, `lr`, `weight_decay`.

    Raises:
        ValueError: nothing is trained, a group is unknown or empty, or a number is not finite or negative.
    """
    return grouped(
        _trained(model),
        learning_rate,
        weight_decay=weight_decay,
        learning_rates=learning_rates,
        weight_decays=weight_decays,
    )


def grouped(
    members: Mapping[Group, list[Tensor]],
    learning_rate: float,
    *,
    weight_decay: float = 0.0,
    learning_rates: Mapping[Group, float] | None = None,
    weight_decays: Mapping[Group, float] | None = None,
) -> list[dict[str, Any]]:
    """Parameters by group as `parameter_groups` returns them."""
    rates = dict.fromkeys(GROUPS, checked_not_negative(learning_rate, "learning_rate"))
    decays = {**dict.fromkeys(GROUPS, checked_not_negative(weight_decay, "weight_decay")), "magnitude": 0.0}
    rates |= _checked_groups(learning_rates or {}, "learning_rates", members)
    decays |= _checked_groups(weight_decays or {}, "weight_decays", members)
    return [
        {"name": name, "params": parameters, "lr": rates[name], "weight_decay": decays[name]}
        for name, parameters in members.items()
        if parameters
    ]


def recommended_rates(model: nn.Module, learning_rate: float = LAMBDA_RATE) -> dict[Group, float]:
    """Learning rates by group, as a starting point for AdamW.

    The magnitude's rate is a share of the median magnitude (without tiny rows), since the row norms of models differ by
    more than a factor of ten; the other vectors are relative to the rows already. Tuning chose 0.007 to 0.035 for
    lambda_b and lambda_d on three models, and mostly this share for the magnitude (`docs/results.md`).

    Args:
        model: as for `parameter_groups`, before its parameters are sharded.
        learning_rate: of lambda_b and lambda_d; the magnitude's is proportional to it, the head's fixed.

    Returns:
        A rate for each group of which the model trains something, for the `learning_rates` of `parameter_groups`.

    Raises:
        ValueError: nothing is trained, a magnitude is sharded, or the learning rate is negative or not finite.
    """
    members = _trained(model)
    checked_not_negative(learning_rate, "learning_rate")
    rates: dict[Group, float] = {"lambda_b": learning_rate, "lambda_d": learning_rate, "head": HEAD_RATE}
    if magnitudes := members["magnitude"]:
        if any(is_dtensor(magnitude) or is_partitioned(magnitude) for magnitude in magnitudes):
            raise ValueError(
                "a magnitude is sharded over processes: call recommended_rates before the model is sharded"
            )
        rows = torch.cat([magnitude.detach().float().abs().flatten().cpu() for magnitude in magnitudes])
        rates["magnitude"] = magnitude_rate(rows, learning_rate)
    return {name: rates[name] for name in GROUPS if members[name]}


def magnitude_rate(magnitudes: Tensor, learning_rate: float) -> float:
    """The recommended rate of magnitudes (of all rows, none negative) beside one of lambda_b and lambda_d."""
    # Rows of pruned outputs say nothing about the step size of the others.
    usual = magnitudes[magnitudes >= USUAL_SHARE * magnitudes.square().mean().sqrt()]
    return MAGNITUDE_SHARE * learning_rate * usual.median().item()


def check_ranks_agree(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Compare the adapters of all ranks; call it on every rank after adapting, before wrapping the model.

    Engines compare shapes at most, so ranks with different seeds or scales would train different adapters as one.

    Args:
        model: with `DVoRAAdapter` layers or adapted through PEFT.
        group: of processes; None means all. Without a process group there is nothing to compare.

    Raises:
        ValueError: on every rank, if two of them differ, or if none has an adapter.
    """
    by_rank = [settings_of(model)]
    if dist.is_initialized():
        by_rank *= dist.get_world_size(group)
        # Gather before raising: a rank that raised alone would leave the others waiting.
        dist.all_gather_object(by_rank, by_rank[0], group=group)
    if not any(by_rank):
        raise ValueError("the model has no DVoRA adapters to compare between ranks: adapt it first")
    for rank, settings in enumerate(by_rank):
        if difference := _difference(by_rank[0], settings):
            name, here, there = difference
            raise ValueError(
                f"the ranks hold different adapters: {name} has {here} on rank 0 and {there} on rank {rank}; adapt "
                "with the same configuration, projection_seed included, on every rank"
            )


class AdapterSettings:
    """Saves the adapters' settings in a training checkpoint and compares them when it is loaded.

    Engines save vectors and compare their shapes at most; with another seed or scale the vectors mean something else.
    Has the two methods that `torch.distributed.checkpoint` and `Accelerator.register_for_checkpointing` need.

    Args:
        model: with `DVoRAAdapter` layers or adapted through PEFT, wrapped or not.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def state_dict(self) -> dict[str, str]:
        """The settings as one text, so that checkpoints of other layers have the same key."""
        return {"settings": json.dumps(settings_of(self.model))}

    def load_state_dict(self, state_dict: dict[str, str]) -> None:
        """Compare the settings of a checkpoint with those of the model.

        Raises:
            ValueError: they differ.
        """
        if difference := _difference(settings_of(self.model), json.loads(state_dict["settings"])):
            name, here, there = difference
            raise ValueError(
                f"the checkpoint is of other adapters: {name} has {here} in the model and {there} in the checkpoint; "
                "adapt with the configuration that it was trained with, projection_seed included"
            )


def settings_of(model: nn.Module) -> dict[str, str]:
    """The settings that must be equal on all ranks, by the name of the adapted weight's module."""
    return {
        ".".join(part for part in name.split(".") if part not in _WRAPPERS): (
            f"{module.extra_repr()}, projections={module.shared.distribution}/{module.shared.fingerprint()}"
        )
        for name, module in model.named_modules()
        if isinstance(module, AdaptedWeight)
    }


def _difference(first: Mapping[str, str], second: Mapping[str, str]) -> tuple[str, str, str] | None:
    """A name whose settings differ, and both."""
    for name in sorted({*first, *second}):
        here, there = first.get(name, "no adapter"), second.get(name, "no adapter")
        if here != there:
            return name, here, there
    return None


def _checked_groups(
    given: Mapping[Group, float], argument: str, members: Mapping[Group, list[Tensor]]
) -> dict[Group, float]:
    for name, value in given.items():
        if name not in GROUPS:
            raise ValueError(f"{argument} names the group {name!r}, expected one of {', '.join(GROUPS)}")
        if not members[name]:
            raise ValueError(f"{argument} names the group {name!r}, of which the model trains nothing")
        checked_not_negative(value, f"{argument}[{name!r}]")
    return dict(given)


def _trained(model: nn.Module) -> dict[Group, list[Tensor]]:
    """The trained parameters by group, each once.

    Raises:
        ValueError: there are none.
    """
    of_plain_layers = {
        id(vector): name
        for layer in model.modules()
        if isinstance(layer, DVoRAAdapter)
        for name, vector in layer.vectors._asdict().items()
    }
    members: dict[Group, list[Tensor]] = {name: [] for name in GROUPS}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members[cast(Group, of_plain_layers.get(id(parameter)) or _vector_of(name))].append(parameter)
    if not any(members.values()):
        raise ValueError(
            "the model trains nothing: adapt it first, and load adapters with is_trainable=True to go on training them"
        )
    return members


def _vector_of(name: str) -> str:
    """The group of a parameter in a PEFT model, by the dictionary of its layer that holds it."""
    parts = name.split(".")
    return next((vector for vector in Vectors._fields if f"dvora_{vector}" in parts), "head")
