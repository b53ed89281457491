"""DVoRAModel: puts DVoRA adapters into a model, the way PEFT's own tuners do."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NoReturn, cast

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import (
    BaseTuner,
    _check_adapters_not_merged,
    _ExcludedModule,
    _maybe_include_all_linear_layers,
)
from peft.utils import TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..adapter_file.patterns import is_named, value_of
from ..adapter_file.settings import DVoRAConfig, own_config
from ..checks import checked_strength
from ..rows.batch import batches_entered, entered
from .base_weight import keep_differentiable
from .injecting import (
    PreparedTarget,
    add_adapter,
    check_adapter,
    check_settings,
    check_targets,
    find_targets,
    names_found,
    wrap,
)
from .layer import DVoRALayer, check_unmerged, layers_in, layers_of
from .merging import merge_model, merged_or_restored, unmerge_model
from .mixed_batch import BASE, NamedBatch, names_passed
from .parameters import ParamWrapper
from .restoring import restored_on_error
from .saving import arriving_values, as_saved, check_load, checked_folder

_COMPILED = "_orig_mod."


class DVoRAModel(BaseTuner):
    """The DVoRA tuner; made by `peft.get_peft_model` and friends. Arguments as for PEFT's other tuners.

    The projections of one seed and distribution exist once in a model, referenced by all its layers and adapters.
    """

    uses_shared_state = False
    _prepared: dict[str, list[PreparedTarget]]
    """While an adapter is added, by the name of the module that PEFT finds."""
    prefix = "dvora_"
    tuner_layer_cls = DVoRALayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING  # type: ignore[assignment]  # some are str

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        # PEFT adds the new configuration to those of the model before anything is checked.
        with restored_on_error(model):
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
            matched = find_targets(model, lambda name: name.removeprefix(_COMPILED) in named, config)
            targets = [
                target._replace(
                    name=target.name.removeprefix(_COMPILED), module_name=target.module_name.removeprefix(_COMPILED)
                )
                for target in matched
            ]
        prepared = check_adapter(targets, filled, model)
        # PEFT keeps the caller's object and writes into it.
        config.target_modules, config.projection_fingerprint = filled.target_modules, filled.projection_fingerprint
        if any(layer.merged for layer in layers_in(model)):
            # As PEFT does, but all layers at once and before anything is changed.
            warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=3)
            unmerge_model(model)
        self._prepared = {}
        for one in prepared.values():
            self._prepared.setdefault(one.target.module_name, []).append(one)
        disabled = any(layer.disable_adapters for layer in layers_in(model))
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        with restored_on_error(self):
            super().inject_adapter(
                model,
                adapter_name,
                autocast_adapter_dtype=autocast_adapter_dtype,
                low_cpu_mem_usage=low_cpu_mem_usage,
                state_dict=state_dict,
            )
            if disabled:
                for layer in layers_of(model, adapter_name):
                    layer.enable_adapters(False)
                # PEFT's switch freezes all adapters of a layer, not only the new one.
                for parameter in trained:
                    parameter.requires_grad_()
            checked_folder(model, config, adapter_name, None if config.file is None else config.file.folder)
        self._prepared = {}
        keep_differentiable(model)

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
        by_layer = strength if isinstance(strength, dict) else {".*": strength}
        for value in by_layer.values():
            checked_strength(value)
        names = self.active_adapters if adapter_name is None else [adapter_name]
        for name in names:
            if name not in self.peft_config:
                raise ValueError(f"adapter_name: there is no adapter {name!r}, only {sorted(self.peft_config)}")
            layers = layers_of(self.model, name)
            for pattern in by_layer:
                if not any(value_of({pattern: True}, layer.name, False) for layer in layers):
                    raise ValueError(f"strength: no layer of adapter {name!r} is named {pattern!r}")
            check_unmerged(self.model, name)
        with restored_on_error(self):
            for name in names:
                for layer in layers_of(self.model, name):
                    by_pattern = value_of(by_layer, layer.name, layer.strength(name))
                    layer.set_strength(name, float(by_layer.get(layer.name, by_pattern)))
                strengths = {layer.name: layer.strength(name) for layer in layers_of(self.model, name)}
                config = own_config(self.peft_config[name])
                config.strength = strengths if isinstance(strength, dict) else float(strength)

    def add_weighted_adapter(
        self, adapters: Sequence[str], weights: Iterable[float], *args: Any, **kwargs: Any
    ) -> NoReturn:
        """Refused: the weighted sum of several adapters' updates has a higher rank than one adapter can have.

        Raises:
            NotImplementedError: always; it shows the calls that activate the adapters together with these weights.
        """
        calls = [f"model.set_strength({weight!r}, {name!r})" for name, weight in zip(adapters, weights, strict=False)]
        raise NotImplementedError(
            "a weighted sum of DVoRA's updates is no single adapter. Activate the adapters together, which is the "
            f"exact sum, merged too: {'; '.join([f'model.base_model.set_adapter({list(adapters)!r})', *calls])}"
        )

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
        if merge:
            self._check_merge_allowed()
        # Copies of all adapted weights stay on the CPU until the last layer is unloaded, to undo a failure.
        merging = merged_or_restored(self.model, adapter_names, safe_merge) if merge else nullcontext()
        with restored_on_error(self), merging:
            super()._unload_and_optionally_merge(merge=False, progressbar=progressbar)
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
    def _check_target_module_exists(peft_config: Any, key: str) -> Any:
        """Whether a layer is targeted, with its direction or with its magnitude only; PEFT asks for every module."""
        targeted = BaseTuner._check_target_module_exists(peft_config, key)
        if targeted or isinstance(targeted, _ExcludedModule):
            return targeted
        return is_named(peft_config.magnitude_modules, key)

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
        config, prepared = own_config(peft_config), self._prepared.get(current_key, [])
        wrapper, layers = wrap(target, [one.target for one in prepared], parent)
        for layer, one in zip(layers, prepared, strict=True):
            add_adapter(layer, adapter_name, config, one, self.active_adapters)
        if wrapper is not target:
            self._replace_module(parent, target_name, wrapper, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Put a layer into its parent; adapters are on the base's device already."""
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Nothing is cast: the vectors are kept in float32 whatever the base's dtype."""
        stored = [] if autocast_adapter_dtype else [layer.stored() for layer in layers_of(self.model, adapter_name)]
        if any(weight is not None and weight.dtype.itemsize < 4 for weight in stored):
            warnings.warn(
                "autocast_adapter_dtype=False is ignored: the vectors stay in float32, because half precision would "
                "round a magnitude by up to 0.4 %; they are kilobytes",
                stacklevel=3,
            )

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        # One that ignores mismatched sizes has dropped them by now.
        check_load(self, state_dict, prefix)
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
        values = arriving_values(model, own_config(config), adapter_name, state_dict)
        # A tuner checks shapes where torch hands it the values: by then PEFT may have dropped some.
        if not any(isinstance(module, DVoRAModel) for module in model.modules()):
            check_load(model, values)
        return values

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand `adapter_names` to every layer for the time of one forward pass; PEFT calls this."""
        if (names := kwargs.get("adapter_names")) is None:
            # A model within another has no part in the rows of the outer one. A compiled graph has no context.
            alone = torch.compiler.is_compiling() or not batches_entered.get()
            with nullcontext() if alone else entered(NamedBatch([], [], ())):
                yield
            return
        if self.training:
            raise ValueError("adapter_names works for inference only; call model.eval() first")
        # A layer may be in several places.
        called = list(dict.fromkeys(_called_in(self)))
        layers = [module for module in called if isinstance(module, DVoRALayer)]
        available = {name for layer in layers for name in layer.dvora_adapted}
        if unknown := sorted(set(names) - available - {BASE}):
            raise ValueError(f"adapter_names: no adapter is named {', '.join(unknown)}; there are {sorted(available)}")
        parameters = [layer for layer in layers if isinstance(layer, ParamWrapper)]
        for layer in parameters:
            layer.check_serves_all_rows(names)
        has_encoder = self.get_model_config(self.model).get("is_encoder_decoder", False)
        encoder = set(self.model.get_encoder().modules()) if has_encoder else set()
        # Beam search repeats every row in all modules but the encoder's.
        repeated = [name for name in names for _ in range(kwargs.get("num_beams") or 1)]
        batch = NamedBatch(repeated, list(names), silent=parameters)
        with names_passed(batch, [module for module in called if module not in parameters], encoder):
            yield


def _called_in(module: nn.Module) -> Iterator[nn.Module]:
    """Adapted layers, and modules that are saved whole, without what adapters have in them: that may be thousands."""
    if isinstance(module, DVoRALayer | AuxiliaryTrainingWrapper):
        yield module
    for child in [module.base_layer] if isinstance(module, DVoRALayer) else module.children():
        yield from _called_in(child)
