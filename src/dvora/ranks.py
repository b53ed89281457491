"""Whether all processes of a run hold the same adapters, asked before they train together."""

import torch.distributed as dist
from torch import nn

from .adapted_weight import AdaptedWeight

Settings = dict[str, str]


def check_ranks_agree(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Compare the adapters of all ranks; call it on every rank after adapting, before wrapping the model.

    Engines compare shapes at most: ranks whose seeds or scales differ would train different adapters as one.

    Args:
        model: with `DVoRAAdapter` layers or adapted through PEFT.
        group: of processes; None means all. Without a process group there is nothing to compare.

    Raises:
        ValueError: on every rank, if two of them differ, or if none has an adapter.
    """
    found = [settings_of(model)]
    if dist.is_initialized():
        found *= dist.get_world_size(group)
        # Before anything is refused: a rank that raised alone would leave the others waiting for it.
        dist.all_gather_object(found, found[0], group=group)
    if not any(found):
        raise ValueError("the model has no DVoRA adapters to compare between ranks: adapt it first")
    for rank, settings in enumerate(found):
        for name in sorted({*found[0], *settings}):
            here, there = found[0].get(name, "no adapter"), settings.get(name, "no adapter")
            if here != there:
                raise ValueError(
                    f"the ranks hold different adapters: {name} has {here} on rank 0 and {there} on rank {rank}; adapt "
                    "with the same configuration, projection_seed included, on every rank"
                )


def settings_of(model: nn.Module) -> Settings:
    """What must be equal on all ranks, by the name of the adapted weight's module."""
    return {
        name: f"{module.extra_repr()}, projections={module.shared.distribution}/{module.shared.fingerprint()}"
        for name, module in model.named_modules()
        if isinstance(module, AdaptedWeight)
    }
