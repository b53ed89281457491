"""The average of the updates of several adapters as one adapter, and how far another adapter is from it."""

from collections.abc import Callable, Sequence

import torch
from peft import PeftModel
from torch import Tensor

from dvora.flat import Layout


def average_update(model: PeftModel, vectors: Sequence[Tensor]) -> Tensor:
    """The adapter whose update is the average of the given ones' updates; they must share lambda_d.

    Args:
        model: with the configuration of the adapters; it is given more of them.
        vectors: the adapters, in its layout.
    """
    names = [f"part {number}" for number in range(len(vectors))]
    for name, vector in zip(names, vectors, strict=True):
        model.add_adapter(name, model.peft_config["default"])
        Layout.of(model, name).from_vector(vector, model)
    model.add_weighted_adapter(names, [1 / len(names)] * len(names), "average")
    return Layout.of(model, "average").to_vector(model)


@torch.no_grad()
def distance_from_average(make: Callable[[], PeftModel], adapter: Tensor, others: Sequence[Tensor]) -> float:
    """How far an adapter's weights are from the average of others', as a share of how far that is from the base.

    Args:
        make: makes the adapted model anew.
        adapter: a vector in its layout.
        others: vectors in its layout.
    """

    def weights(vector: Tensor | None) -> Tensor:
        model = make()
        if vector is not None:
            Layout.of(model).from_vector(vector, model)
        return torch.cat([parameter.flatten() for parameter in model.merge_and_unload().parameters()]).double()

    average = torch.stack([weights(each) for each in others]).mean(0)
    return float((weights(adapter) - average).norm() / (average - weights(None)).norm())
