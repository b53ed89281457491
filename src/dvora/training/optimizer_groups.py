"""Parameter groups for any optimizer, each with its learning rate and weight decay."""

from collections.abc import Mapping
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from ..engines.tensor_parallel import is_dtensor
from ..engines.zero3 import is_partitioned
from ..method.functional import Vectors
from ..method.validation import checked_not_negative
from ..weight.adapter import DVoRAAdapter

Group = Literal["magnitude", "lambda_b", "lambda_d", "head"]
GROUPS: tuple[Group, ...] = get_args(Group)
"""`head` is everything trained other than the vectors: heads, token embeddings, a base that is not frozen."""
LAMBDA_RATE = 0.02
HEAD_RATE = 1e-3
MAGNITUDE_SHARE = 0.35
"""Learning rates of `recommended_rates`; the magnitude's is this share of the others' for rows of norm one."""
USUAL_SHARE = 1e-2
"""Rows below this share of the magnitudes' root mean square are ignored for the magnitude's rate."""


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
    members = _trained(model)
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
    lambda_b and lambda_d on three models, and mostly this share for the magnitude (`docs/results.md`, question 4).

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
    if members["magnitude"]:
        if any(is_dtensor(magnitude) or is_partitioned(magnitude) for magnitude in members["magnitude"]):
            raise ValueError(
                "a magnitude is sharded over processes: call recommended_rates before the model is sharded"
            )
        every = torch.cat([magnitude.detach().float().abs().flatten().cpu() for magnitude in members["magnitude"]])
        rates["magnitude"] = magnitude_rate(every, learning_rate)
    return {name: rates[name] for name in GROUPS if members[name]}


def magnitude_rate(magnitudes: Tensor, learning_rate: float) -> float:
    """The recommended rate of magnitudes (of all rows, none negative) beside one of lambda_b and lambda_d."""
    # Rows of pruned outputs say nothing about the step size of the others.
    usual = magnitudes[magnitudes >= USUAL_SHARE * magnitudes.square().mean().sqrt()]
    return MAGNITUDE_SHARE * learning_rate * usual.median().item()


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
    own = {
        id(vector): name
        for layer in model.modules()
        if isinstance(layer, DVoRAAdapter)
        for name, vector in layer.vectors._asdict().items()
    }
    members: dict[Group, list[Tensor]] = {name: [] for name in GROUPS}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members[cast(Group, own.get(id(parameter)) or _vector_of(name))].append(parameter)
    if not any(members.values()):
        raise ValueError(
            "the model trains nothing: adapt it first, and load adapters with is_trainable=True to go on training them"
        )
    return members


def _vector_of(name: str) -> str:
    """The group of a parameter in a PEFT model, by the dictionary of its layer that holds it."""
    parts = name.split(".")
    return next((vector for vector in Vectors._fields if f"dvora_{vector}" in parts), "head")
