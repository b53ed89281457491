"""DVoRAModel: puts DVoRA adapters into a model, the way PEFT's own tuners do."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import (
    BaseTuner,
    _ExcludedModule,
    _maybe_include_all_linear_layers,
    onload_layer,
)
from peft.utils import TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING
from torch import Tensor, nn

from ..merging import warn_of_losses
from .checks import check_mergeable, check_targets, check_weights
from .config import DVoRAConfig, own_config
from .injection import add_adapter, projections_of
from .layer import DVoRALayer
from .loading import check_shapes, checked_vectors
from .mixed_batch import adapter_names_passed
from .saving import as_saved, from_saved
from .targets import Target, matches, names_found, outside_adapters, parameters_named, targets_in, wrap


class DVoRAModel(BaseTuner):
    """The DVoRA tuner; made by `peft.get_peft_model` and friends. Arguments as for PEFT's other tuners.

    The projections of one seed and distribution exist once in a model, referenced by all its layers and adapters.
    """

    uses_shared_state = False
    prefix = "dvora_"
    tuner_layer_cls = DVoRALayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING  # type: ignore[assignment]  # some are str

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        # PEFT enters the new configuration beside those of the model's adapters before anything is checked.
        held = vars(model).get("peft_config")
        before = dict(held) if isinstance(held, dict) else None
        try:
            super().__init__(model, peft_config, adapter_name, low_cpu_mem_usage, state_dict)
        except Exception:
            if held is not None and before is not None:
                held.clear()
                held.update(before)
            raise

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Check everything first, then let PEFT replace the targeted layers. The caller's config is not changed."""
        config = own_config(copy.deepcopy(self.peft_config[adapter_name]))
        config.check()
        self._fill_in_targets(config, model)
        targets = self._targets(model, config, state_dict)
        if state_dict is None:
            check_targets(targets, config, model)
        config.base_probes = check_weights(targets, config)
        self.peft_config[adapter_name] = config
        super().inject_adapter(
            model,
            adapter_name,
            autocast_adapter_dtype=autocast_adapter_dtype,
            low_cpu_mem_usage=low_cpu_mem_usage,
            state_dict=state_dict,
        )

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters into the base's weights; `unmerge_adapter` restores them bit for bit.

        Args:
            adapter_names: which; None means the active ones.
            safe_merge: PEFT's switch for refusing values that are not finite; here they always are refused.

        Raises:
            ValueError: a value is not finite, or a weight is tied to another layer's; nothing is merged.

        Warns:
            MergePrecisionWarning: once, with the figures, if the dtype swallows a considerable part of the update.
        """
        self._merge(adapter_names, keep_original=True)

    def unmerge_adapter(self) -> None:
        """Put the base's own weights back, bit for bit."""
        merged = [layer for layer in self.model.modules() if isinstance(layer, DVoRALayer) and layer.merged]
        if not merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        for layer in merged:
            with onload_layer(layer):
                layer.unmerge()

    def _unload_and_optionally_merge(  # type: ignore[override]  # PEFT returns the model, its annotation says None
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._merge(adapter_names, keep_original=False)
        super()._unload_and_optionally_merge(merge=False, progressbar=progressbar)
        model: nn.Module = self.model
        return model

    def _merge(self, adapter_names: list[str] | None, keep_original: bool) -> None:
        self._check_merge_allowed()
        check_mergeable(self.model, self.active_adapters if adapter_names is None else adapter_names)
        losses: dict[str, float] = {}
        dtype = torch.float32
        for layer in self.model.modules():
            if isinstance(layer, DVoRALayer):
                with onload_layer(layer):
                    losses |= layer.merge_quietly(adapter_names, keep_original)
                    stored = layer.stored()
                    dtype = dtype if stored is None else stored.dtype
        warn_of_losses(losses, dtype)

    def _fill_in_targets(self, config: DVoRAConfig, model: nn.Module) -> None:
        """PEFT's default targets of the architecture, where the user names none: those of them that exist."""
        if config.target_modules is None:
            model_config = self.get_model_config(model)
            named_otherwise = config.target_parameters or config.magnitude_modules
            if named_otherwise and model_config.get("model_type") not in self.target_module_mapping:
                config.target_modules = set()
                return
            self._prepare_adapter_config(config, model_config)
            if isinstance(config.target_modules, set):
                config.target_modules = names_found(config.target_modules, model)

    def _targets(self, model: nn.Module, config: DVoRAConfig, state_dict: dict[str, Tensor] | None) -> list[Target]:
        """The weights that PEFT is about to have adapted."""
        if state_dict is None:
            resolved = _maybe_include_all_linear_layers(copy.deepcopy(config), model)
            found = [
                (name, module)
                for name, module in outside_adapters(model)
                if name and self._check_target_module_exists(resolved, name)
            ]
        else:
            named = {key.rsplit(f".{self.prefix}", 1)[0] for key in state_dict}
            found = [(name, module) for name, module in outside_adapters(model) if name in named]
        targets = {target.name: target for name, module in found for target in targets_in(module, name)}
        parameters = parameters_named(model, config.target_parameters or ())
        return [*targets.values(), *(target for target in parameters if target.name not in targets)]

    @staticmethod
    def _check_target_module_exists(peft_config: PeftConfig, key: str) -> Any:
        """Whether a layer is targeted, with its direction or with its magnitude only; PEFT asks for every module."""
        found = BaseTuner._check_target_module_exists(peft_config, key)
        if found or isinstance(found, _ExcludedModule):
            return found
        return matches(own_config(peft_config).magnitude_modules, key)

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        config = own_config(peft_config)
        wrapper, layers = wrap(target, current_key, parameter_name)
        shared = projections_of(self.model, config)
        for layer in layers:
            only_magnitude = matches(config.magnitude_modules, current_key)
            add_adapter(layer, adapter_name, config, shared, self.active_adapters, only_magnitude)
        if wrapper is not target:
            self._replace_module(parent, target_name, wrapper, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Put a layer into its parent; adapters are on the base's device already."""
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """The vectors are kept in float32 whatever the base's dtype, so there is nothing to cast."""

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        # Before anything is copied; a model that ignores mismatched sizes has dropped them by now.
        check_shapes(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        vectors = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        return as_saved(model, own_config(config), vectors)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        vectors = from_saved(model, own_config(config), state_dict)
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, vectors)
        checked = checked_vectors(model, adapter_name, remapped)
        if not any(isinstance(module, DVoRAModel) for module in model.modules()):
            check_shapes(model, checked)
        return checked

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand `adapter_names` to every layer for the time of one forward pass; PEFT calls this."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        has_encoder = self.get_model_config(self.model).get("is_encoder_decoder", False)
        encoder = set(self.model.get_encoder().modules()) if has_encoder else set()
        with adapter_names_passed(self, names, kwargs.get("num_beams") or 1, encoder):
            yield
