"""Takes an adapter out of a model again that was put there for the values of a file, if these are refused."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper

from ..config import own_config
from ..layer import DVoRALayer, layers_of


def withdrawal(tuner: BaseTuner, names: Collection[str]) -> Callable[[], None]:
    """What takes adapters out of a model again, of those that wait for the values of a file and were not trained since.

    Args:
        tuner: of the model.
        names: of the adapters.

    Returns:
        A function for `on_failure`, which may be called again at any point.
    """
    trained_before: dict[str, set[str]] = {}

    def withdraw() -> None:
        for name in tuner.peft_config.keys() & names:
            awaited = own_config(tuner.peft_config[name]).awaited
            if awaited is not None and all(_is_untouched(layer, name) for layer in layers_of(tuner.model, name)):
                trained_before[name] = awaited
        for name, trained in trained_before.items():
            if name in tuner.peft_config:
                tuner.delete_adapter(name)
            _unwrap_what_is_empty(tuner)
            for parameter_name, parameter in tuner.model.named_parameters():
                parameter.requires_grad_(parameter_name in trained)
            if not tuner.peft_config:
                # PEFT has left its own mark on the base, by which it would take it for an adapted model.
                vars(tuner.model).pop("peft_config", None)

    return withdraw


def _is_untouched(layer: DVoRALayer, adapter_name: str) -> bool:
    """Whether an adapter of a layer still has its starting values."""
    magnitude, lambda_b, _ = layer.vectors(adapter_name)
    own = layer.adapted(adapter_name).w
    return magnitude.is_meta or (torch.equal(magnitude.to(own), own) and not lambda_b.any())


def _unwrap_what_is_empty(tuner: BaseTuner) -> None:
    # A parameter's wrapper may be around another's: the inner ones first.
    for path, module in reversed(list(tuner.model.named_modules())):
        parent, _, name = path.rpartition(".")
        if isinstance(module, DVoRALayer) and not module.dvora_adapted:
            setattr(tuner.model.get_submodule(parent), name, module.base_layer)
        elif isinstance(module, AuxiliaryTrainingWrapper) and not module._adapters:
            setattr(tuner.model.get_submodule(parent), name, module.original_module)
