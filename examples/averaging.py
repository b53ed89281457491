"""The average of the updates of several adapters as one adapter, and how far another adapter is from it."""

from collections.abc import Callable, Sequence

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

State = dict[str, Tensor]
"""An adapter's vectors by name."""


def average_update(model: PeftModel, states: Sequence[State]) -> State:
    """The adapter whose update is the average of the given ones' updates; they must share lambda_d.

    Args:
        model: with the configuration of the adapters; it is given more of them.
        states: of the adapters.
    """
    names = [f"part {number}" for number in range(len(states))]
    for name, state in zip(names, states, strict=True):
        model.add_adapter(name, model.peft_config["default"])
        set_peft_model_state_dict(model, state, name)
    model.add_weighted_adapter(names, [1 / len(names)] * len(names), "average")
    return get_peft_model_state_dict(model, adapter_name="average")


@torch.no_grad()
def distance_from_average(make: Callable[[], PeftModel], state: State, states: Sequence[State]) -> float:
    """How far an adapter's weights are from the average of others', as a share of how far that is from the base.

    Args:
        make: makes the adapted model anew.
        state: of the adapter.
        states: of the others.
    """

    def weights(vectors: State | None) -> Tensor:
        model = make()
        if vectors is not None:
            set_peft_model_state_dict(model, vectors)
        return torch.cat([parameter.flatten() for parameter in model.merge_and_unload().parameters()]).double()

    average = torch.stack([weights(each) for each in states]).mean(0)
    return float((weights(state) - average).norm() / (average - weights(None)).norm())
