"""Checks that all processes of a run hold the same adapters, and that a checkpoint belongs to them."""

import json

import torch.distributed as dist
from torch import nn

from ..weight.adapted_weight import AdaptedWeight

Settings = dict[str, str]

_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Names that engines insert into module paths."""


def check_ranks_agree(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Compare the adapters of all ranks; call it on every rank after adapting, before wrapping the model.

    Engines compare shapes at most, so ranks with different seeds or scales would train different adapters as one.

    Args:
        model: with `DVoRAAdapter` layers or adapted through PEFT.
        group: of processes; None means all. Without a process group there is nothing to compare.

    Raises:
        ValueError: on every rank, if two of them differ, or if none has an adapter.
    """
    found = [settings_of(model)]
    if dist.is_initialized():
        found *= dist.get_world_size(group)
        # Gather before raising: a rank that raised alone would leave the others waiting.
        dist.all_gather_object(found, found[0], group=group)
    if not any(found):
        raise ValueError("the model has no DVoRA adapters to compare between ranks: adapt it first")
    for rank, settings in enumerate(found):
        if difference := _difference(found[0], settings):
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


def settings_of(model: nn.Module) -> Settings:
    """The settings that must be equal on all ranks, by the name of the adapted weight's module."""
    return {
        _without_wrappers(name): f"{module.extra_repr()}, projections={module.shared.distribution}/"
        f"{module.shared.fingerprint()}"
        for name, module in model.named_modules()
        if isinstance(module, AdaptedWeight)
    }


def _without_wrappers(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _difference(first: Settings, second: Settings) -> tuple[str, str, str] | None:
    """A name whose settings differ, and both."""
    for name in sorted({*first, *second}):
        here, there = first.get(name, "no adapter"), second.get(name, "no adapter")
        if here != there:
            return name, here, there
    return None
