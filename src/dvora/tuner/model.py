"""DVoRAModel: puts DVoRA adapters into a model, the way PEFT's own tuners do."""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import (
    BaseTuner,
    _maybe_include_all_linear_layers,
    onload_layer,
)
from peft.utils import TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from .. import generator
from ..adapted_weight import AdaptedWeight, checked_direction
from ..functional import Vectors
from ..merging import warn_of_losses
from ..projections import SharedProjections, checked_distribution
from .checks import check_layers, check_mergeable, check_targets, checked_vectors, names_found, outside_adapters
from .config import DVoRAConfig
from .kinds import weight_of
from .layer import BASE, DVoRALayer

_MATRIX_PREFIX = "base_model.dvora_projections."
_RANDOM_START_STREAM = 2**32


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
        config = _own(copy.deepcopy(self.peft_config[adapter_name]))
        config.check()
        self._fill_in_targets(config, model)
        targets = self._targets(model, config, state_dict)
        if state_dict is None:
            check_targets(targets, config, model)
        config.base_probes = check_layers(targets, config)
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
                    dtype = weight_of(layer.base_layer).dtype
        warn_of_losses(losses, dtype)

    def _fill_in_targets(self, config: DVoRAConfig, model: nn.Module) -> None:
        """PEFT's default targets of the architecture, where the user names none: those of them that exist."""
        if config.target_modules is None:
            self._prepare_adapter_config(config, self.get_model_config(model))
            if isinstance(config.target_modules, set):
                config.target_modules = names_found(config.target_modules, model)

    def _targets(
        self, model: nn.Module, config: DVoRAConfig, state_dict: dict[str, Tensor] | None
    ) -> dict[str, nn.Module]:
        """The layers that PEFT is about to replace, by name."""
        if state_dict is not None:
            named = {key.rsplit(f".{self.prefix}", 1)[0] for key in state_dict}
            return {name: module for name, module in outside_adapters(model) if name in named}
        resolved = _maybe_include_all_linear_layers(copy.deepcopy(config), model)
        return {
            name: module
            for name, module in outside_adapters(model)
            if name and self._check_target_module_exists(resolved, name)
        }

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
        config = _own(peft_config)
        layer = target if isinstance(target, DVoRALayer) else DVoRALayer(target, current_key)
        adapted = AdaptedWeight(
            layer.unmerged_matrix(),
            config.rank_of(current_key),
            shared=_projections_of(self.model, config),
            alpha=config.alpha_of(current_key),
            direction=checked_direction(config.direction),
            detach_norm=config.detach_norm,
            name=current_key,
        )
        vectors = adapted.initial_vectors(config.d_initial)
        if not config.init_weights:
            vectors = _random_vectors(vectors, config.projection_seed, f"{adapter_name}/{current_key}")
        layer.update_layer(adapter_name, adapted, vectors, config.dvora_dropout, config.inference_mode)
        if layer is not target:
            layer.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
            self._replace_module(parent, target_name, layer, target)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """The vectors are kept in float32 whatever the base's dtype, so there is nothing to cast."""

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
        own = _own(config)
        if not own.save_projection:
            return vectors
        matrices = _projections_of(model, own).matrices()
        return vectors | {f"{_MATRIX_PREFIX}{name}": matrix for name, matrix in matrices.items()}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        matrices = {k.removeprefix(_MATRIX_PREFIX): v for k, v in state_dict.items() if k.startswith(_MATRIX_PREFIX)}
        _projections_of(model, _own(config)).check_matrices(matrices)
        rest = {k: v for k, v in state_dict.items() if not k.startswith(_MATRIX_PREFIX)}
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, rest)
        return checked_vectors(model, adapter_name, remapped)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hand `adapter_names` to every layer for the time of one forward pass; PEFT calls this."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("adapter_names works for inference only; call model.eval() first")
        known = {name for layer in self.modules() if isinstance(layer, DVoRALayer) for name in layer.dvora_adapted}
        unknown = sorted(set(names) - known - {BASE})
        if unknown:
            raise ValueError(f"adapter_names: no adapter is named {', '.join(unknown)}; there are {sorted(known)}")
        # Beam search repeats every row in all modules but the encoder's.
        beams = kwargs.get("num_beams") or 1
        repeated = [name for name in names for _ in range(beams)]
        has_encoder = self.get_model_config(self.model).get("is_encoder_decoder", False)
        encoder = set(self.model.get_encoder().modules()) if has_encoder else set()
        handles = [
            module.register_forward_pre_hook(
                partial(_pass_adapter_names, names=list(names) if module in encoder else repeated), with_kwargs=True
            )
            for module in self.modules()
            if isinstance(module, DVoRALayer | AuxiliaryTrainingWrapper)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _own(config: PeftConfig) -> DVoRAConfig:
    assert isinstance(config, DVoRAConfig), type(config)
    return config


def _pass_adapter_names(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], names: Sequence[str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {**kwargs, "adapter_names": names}


def _projections_of(model: nn.Module, config: DVoRAConfig) -> SharedProjections:
    """The model's projections of this seed and distribution, or new ones."""
    for module in model.modules():
        if (
            isinstance(module, SharedProjections)
            and module.seed == config.projection_seed
            and module.distribution == config.projection_init
        ):
            return module
    return SharedProjections(config.projection_seed, checked_distribution(config.projection_init))


def _random_vectors(start: Vectors, seed: int, key: str) -> Vectors:
    """Vectors that are not the identity, a pure function of the seed and the layer's and adapter's names."""
    stream = _RANDOM_START_STREAM + int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big")
    magnitude, lambda_b, lambda_d = (
        torch.from_numpy(generator.uniform_row(seed, stream, row, len(vector))).to(vector)
        for row, vector in enumerate(start)
    )
    return Vectors(start.magnitude * (1 + 0.1 * magnitude), lambda_b, 1 + lambda_d)
