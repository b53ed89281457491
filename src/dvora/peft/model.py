"""DVoRAModel: puts DVoRA adapters into a model, the way PEFT's own tuners do."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import (
    BaseTuner,
    _check_adapters_not_merged,
    _ExcludedModule,
    _maybe_include_all_linear_layers,
)
from peft.utils import TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING
from torch import Tensor, nn

from ..factors import add_factor_pass, remove_factor_pass
from ..functional import Vectors
from .arithmetic import combined_config, interpolated_vectors, set_strength, set_vectors, summed_vectors
from .config import DVoRAConfig, own_config
from .injecting.checks import check_adapter, check_settings, check_targets, warn_of_kept_dtype
from .injecting.inject import PreparedTarget, add_adapter
from .injecting.targets import find_targets, matches, names_found, wrap
from .layers.layer import DVoRALayer, check_unmerged, layers_in, layers_of
from .layers.mixed_rows import in_progress, this_thread
from .layers.opaque_weight import keep_differentiable
from .merging import merge_model, merging, unmerge_before_adding, unmerge_model
from .mixed_batch import adapter_names_passed
from .restoring import modules_as_they_are, on_failure
from .state.checked_values import check_load, vectors_among
from .state.state_dict import as_saved, from_saved
from .state.withdrawal import withdrawal

_COMPILED = "_orig_mod."


class DVoRAModel(BaseTuner):
    """The DVoRA tuner; made by `peft.get_peft_model` and friends. Arguments as for PEFT's other tuners.

    The projections of one seed and distribution exist once in a model, referenced by all its layers and adapters.
    """

    uses_shared_state = False
    _prepared: dict[str, PreparedTarget]
    prefix = "dvora_"
    tuner_layer_cls = DVoRALayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING  # type: ignore[assignment]  # some are str

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        # PEFT adds the new configuration to those of the model before anything is checked.
        with on_failure(modules_as_they_are(model)):
            super().__init__(model, *args, **kwargs)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter; if an error or an interruption stops that, the model is as it was and has no such name."""
        try:
            self._inject(model, adapter_name, *args, **kwargs)
        finally:
            if not any(layers_of(model, adapter_name)):
                self.peft_config.pop(adapter_name, None)

    def _inject(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Check everything first, then let PEFT replace the targeted layers."""
        config = own_config(self.peft_config[adapter_name])
        check_settings(config, adapter_name, model)
        filled = self._with_targets(config, model)
        if state_dict is None:
            resolved = _maybe_include_all_linear_layers(copy.deepcopy(filled), model)
            targets = find_targets(model, lambda name: bool(self._check_target_module_exists(resolved, name)), config)
            check_targets(targets, filled, model)
        else:
            named = {key.rsplit(f".{self.prefix}", 1)[0].removeprefix(_COMPILED) for key in state_dict}
            found = find_targets(model, lambda name: name.removeprefix(_COMPILED) in named, config)
            targets = [target._replace(name=target.name.removeprefix(_COMPILED)) for target in found]
        self._prepared = check_adapter(targets, filled, model)
        # PEFT keeps the caller's object and writes into it.
        config.target_modules, config.projection_fingerprint = filled.target_modules, filled.projection_fingerprint
        unmerge_before_adding(model)
        with on_failure(modules_as_they_are(self)):
            super().inject_adapter(
                model,
                adapter_name,
                autocast_adapter_dtype=autocast_adapter_dtype,
                low_cpu_mem_usage=low_cpu_mem_usage,
                state_dict=state_dict,
            )
        self._prepared = {}
        for module in model.modules():
            keep_differentiable(module)
        add_factor_pass(model)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; if it is the only active one, the first of the others is activated, in every layer.

        Raises:
            ValueError: there is no such adapter, or it is merged.
        """
        if self.active_adapters == [adapter_name]:
            # PEFT lets every layer choose among its own adapters, so layers could choose different ones.
            _check_adapters_not_merged(self.model, adapter_name)
            others = sorted(set(self.peft_config) - {adapter_name})[:1]
            if others:
                warnings.warn(
                    f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to {others[0]}.",
                    stacklevel=3,
                )
            for layer in layers_in(self.model):
                layer.set_adapter(others)
            self.active_adapter = others
        super().delete_adapter(adapter_name)

    def set_strength(self, strength: float | dict[str, float], adapter_name: str | None = None) -> None:
        """Scale an adapter in place, `W + s (W' - W)`: 0 gives the base exactly, 1 the adapter itself exactly.

        Args:
            strength: s, or its values by layer name or regular expression; layers that it does not name keep theirs.
            adapter_name: of the adapter; None means the active ones. Its configuration keeps the strength.

        Raises:
            TypeError, ValueError: s is not a finite number, a name matches nothing, or the adapter is merged.
        """
        for name in self.active_adapters if adapter_name is None else [adapter_name]:
            if name not in self.peft_config:
                raise ValueError(f"adapter_name: there is no adapter {name!r}, only {sorted(self.peft_config)}")
            set_strength(self.model, own_config(self.peft_config[name]), name, strength)

    def interpolate_adapters(self, first: str, second: str, t: float, adapter_name: str) -> None:
        """Add an adapter whose vectors lie between those of two others: the first at t = 0, the second at t = 1.

        Raises:
            ValueError: the adapters differ in more than the values of their vectors, or t does not lie in 0 .. 1.
        """
        config = combined_config(self.model, self._own_configs(), [first, second], adapter_name)
        self._add_combined(adapter_name, config, interpolated_vectors(self.model, first, second, t))

    def add_weighted_adapter(
        self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, combination_type: str = "linear"
    ) -> None:
        """Add an adapter whose update is the weighted sum of other adapters' updates, where one adapter can have it.

        Args:
            adapters: names of the adapters; they must share lambda_d up to a factor wherever they turn rows.
            weights: one for each.
            adapter_name: of the sum.
            combination_type: "linear"; PEFT's others are approximations.

        Raises:
            ValueError: no single adapter has that update; the message says why and what to do instead.
        """
        if combination_type != "linear":
            raise ValueError(f"combination_type={combination_type!r} would only approximate the sum; use 'linear'")
        config = combined_config(self.model, self._own_configs(), adapters, adapter_name)
        self._add_combined(adapter_name, config, summed_vectors(self.model, adapters, weights))

    def _own_configs(self) -> dict[str, DVoRAConfig]:
        return {name: own_config(config) for name, config in self.peft_config.items()}

    def _add_combined(self, adapter_name: str, config: DVoRAConfig, vectors: dict[str, Vectors]) -> None:
        with on_failure(modules_as_they_are(self)):
            self.peft_config[adapter_name] = config
            self.inject_adapter(self.model, adapter_name)
            set_vectors(self.model, adapter_name, vectors)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters into the base's weights; `unmerge_adapter` restores them bit for bit.

        Args:
            adapter_names: which; None means the active ones.
            safe_merge: PEFT's switch for refusing values that are not finite; here they always are refused.

        Raises:
            ValueError: a value is not finite, or a weight is tied to another layer's; nothing is merged.

        Warns:
            MergePrecisionWarning: once, with the figures, if rounding removes a considerable part of the update.
        """
        self._check_merge_allowed()
        merge_model(self.model, adapter_names, keep_original=True, safe_merge=safe_merge)

    def unmerge_adapter(self) -> None:
        """Put the base's own weights back, bit for bit."""
        unmerge_model(self.model)

    def _unload_and_optionally_merge(  # type: ignore[override]  # PEFT returns the model, its annotation says None
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        # Copies of all adapted weights stay on the CPU until the last layer is merged, to undo a failure.
        if merge:
            self._check_merge_allowed()
        undo = modules_as_they_are(self)
        with merging(self.model, adapter_names, safe_merge, undo) if merge else on_failure(undo):
            super()._unload_and_optionally_merge(merge=False, progressbar=progressbar)
        remove_factor_pass(self.model)
        return cast(nn.Module, self.model)

    def _with_targets(self, config: DVoRAConfig, model: nn.Module) -> DVoRAConfig:
        """The configuration with PEFT's targets for the architecture where the user names none: those that exist."""
        config = copy.deepcopy(config)
        if config.target_modules is None:
            model_config = self.get_model_config(model)
            named_otherwise = config.target_parameters or config.magnitude_modules
            if named_otherwise and model_config.get("model_type") not in self.target_module_mapping:
                config.target_modules = set()
                return config
            self._prepare_adapter_config(config, model_config)
            if isinstance(config.target_modules, set):
                config.target_modules = names_found(config.target_modules, model)
        return config

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
        wrapper, layers = wrap(target, current_key, parameter_name, parent)
        for layer in layers:
            add_adapter(layer, adapter_name, config, self._prepared[layer.name], self.active_adapters)
        if wrapper is not target and any(other.disable_adapters for other in layers_in(self.model)):
            for layer in layers:
                layer.enable_adapters(False)
        if wrapper is not target:
            self._replace_module(parent, target_name, wrapper, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Put a layer into its parent; adapters are on the base's device already."""
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Nothing is cast: the vectors are kept in float32 whatever the base's dtype."""
        if not autocast_adapter_dtype:
            warn_of_kept_dtype(layers_of(self.model, adapter_name))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        names = vectors_among(state_dict) & self.peft_config.keys()
        with on_failure(withdrawal(self, names)):
            # One that ignores mismatched sizes has dropped them by now.
            check_load(self, state_dict, prefix)
        for name in names:
            own_config(self.peft_config[name]).awaited = None
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
        return as_saved(model, own_config(config), adapter_name, vectors)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        check_unmerged(model, adapter_name)
        tuner = next((module for module in model.modules() if isinstance(module, DVoRAModel)), None)
        # Without a tuner, as after `inject_adapter_in_model`, the adapter cannot be removed again.
        with on_failure(*([withdrawal(tuner, [adapter_name])] if tuner else [])):
            values = from_saved(model, own_config(config), adapter_name, state_dict)
            if tuner is None:
                check_load(model, values)
            return values

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand `adapter_names` to every layer for the time of one forward pass; PEFT calls this."""
        if (names := kwargs.get("adapter_names")) is None:
            # A model within another whose rows have adapters of their own has no part in those.
            alone = torch.compiler.is_compiling() or this_thread.batch is None
            with nullcontext() if alone else in_progress(None):
                yield
            return
        has_encoder = self.get_model_config(self.model).get("is_encoder_decoder", False)
        encoder = set(self.model.get_encoder().modules()) if has_encoder else set()
        with adapter_names_passed(self, names, kwargs.get("num_beams") or 1, encoder):
            yield
