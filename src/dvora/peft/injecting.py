"""Putting adapters into a model: which weights names match, the checks before anything is changed, and the change.

PEFT replaces layers one by one, so an error on the way would leave the model partly adapted: everything is checked
first, and what is known by then (`Target`, `PreparedTarget`) is what the layers get.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.other import _get_input_embeddings_name
from torch import Tensor, nn

from ..adapter_file.fingerprint import alike, change, fingerprint_of, warn_of_changes
from ..adapter_file.patterns import is_named
from ..adapter_file.settings import DVoRAConfig, check_adapter_name
from ..checks import check_bias, check_weight, checked_direction
from ..functional import Vectors
from ..matrices import philox
from ..matrices.interface import SharedProjections
from ..matrices.vera import vera_sizes
from ..tensors import bias_of, full_tensor, is_fully_sharded, is_partitioned
from ..text import nearest
from ..weight import MAGNITUDE_ONLY, AdaptedWeight
from .base_weight import readable_weight, stored_weight
from .layer import DVoRALayer, DVoRALinear, shared_projections
from .layer_types import (
    LAYER_TYPES,
    READ,
    LayerType,
    is_initialized,
    is_linear_by_forward,
    is_read,
    layer_type_of,
    linear,
    padding_column,
    parameter_type,
    sizes_of,
)
from .parameters import ParamWrapper, ReadLinear, UnfusedLinear, projections_of, wrapped
from .saving import check_ranks

_NAMES_SHOWN, _SHOWN = 20, 100
"""Names, and characters of one, that a message repeats."""
_RANDOM_START_STREAM = 2**32
_TARGETED_TWICE = "its layer is targeted by target_modules too"

# ---- which weights


class Target(NamedTuple):
    """One weight to adapt."""

    name: str
    """Of the weight: by which rank and alpha patterns, fingerprints and messages name it."""
    layer: nn.Module
    """The layer that holds it, or the wrapper that it has already."""
    layer_type: LayerType
    parameter_name: str
    module_name: str
    """Of the module that was targeted, or of the parameter."""

    def base(self) -> nn.Module:
        """The layer that holds the weight."""
        return _base_of(self.layer, self.name)

    def is_readable(self) -> bool:
        """Whether every pass can read the weight: it is not quantised, offloaded or partitioned (ZeRO-3)."""
        stored = stored_weight(self.base(), self.layer_type, self.parameter_name)
        return stored is not None and not stored.is_meta and not is_partitioned(stored)

    def weight(self) -> Tensor:
        """The base's own weight, as stored; gathered where it is sharded."""
        if isinstance(self.layer, DVoRALayer):
            return full_tensor(self.layer.unmerged())
        if self.layer_type.low_rank is None:
            # Offloaded, it could be read here, but not when its module reads it.
            check_weight(self.layer.get_parameter(self.parameter_name), self.name)
        return full_tensor(readable_weight(self.layer, self.layer_type, self.parameter_name, self.name))

    def rank(self, config: DVoRAConfig) -> int:
        """The rank that it gets; `MAGNITUDE_ONLY` where the configuration says so."""
        # Attention's output projection may be named by itself, or as a part of the attention.
        names = config.magnitude_modules
        only = is_named(names, self.module_name) or is_named(names, self.name)
        return MAGNITUDE_ONLY if only else config.rank_of(self.name)


def find_targets(model: nn.Module, is_targeted: Callable[[str], bool], config: DVoRAConfig) -> list[Target]:
    """The weights that PEFT is about to ask adapters for.

    Args:
        model: the model to adapt.
        is_targeted: whether a module, by its name, is targeted.
        config: which may name parameters, too.

    Raises:
        TypeError, ValueError: one of them cannot be adapted.
    """
    targets: dict[str, Target] = {}
    for name, module in outside_adapters(model):
        if name and is_targeted(name):
            for target in _targets_in(module, name):
                targets.setdefault(target.name, target)
    called = {target.module_name for target in targets.values() if target.layer_type.low_rank is not None}
    for target in _parameters_named(model, config.target_parameters or ()):
        if target.name.rpartition(".")[0] in called:
            raise ValueError(f"target_parameters: {target.name} cannot be wrapped, because {_TARGETED_TWICE}")
        targets.setdefault(target.name, target)
    _check_in_one_place(model, targets.values())
    return list(targets.values())


def _check_in_one_place(model: nn.Module, targets: Iterable[Target]) -> None:
    """Refuse a layer that stands in several places of the model: PEFT would wrap it in one of them."""
    places = Counter(child for parent in model.modules() for child in parent._modules.values())
    for target in targets:
        if places[target.layer] > 1:
            everywhere = model.named_modules(remove_duplicate=False)
            names = [name for name, module in everywhere if module is target.layer]
            raise ValueError(
                f"{target.name} is one module in several places ({', '.join(names)}), of which an adapter would be in "
                "one; leave it out with exclude_modules, or give each place a layer of its own (copy.deepcopy)"
            )


def _targets_in(module: nn.Module, name: str) -> list[Target]:
    """The weights of a targeted module: one, or all projections of an attention."""
    base = _base_of(module, name)
    if isinstance(base, nn.MultiheadAttention):
        inputs = [_parameter_target(module, p, f"{name}.{p}") for p in projections_of(base)]
        both = [*inputs, *_targets_in(base.out_proj, f"{name}.out_proj")]
        return [target._replace(module_name=name) for target in both]
    if isinstance(module, DVoRALayer):
        return [Target(name, module, module.layer_type, module.parameter_name, name)]
    if not is_initialized(base):
        check_weight(next(base.parameters()), name)
    return [Target(name, base, layer_type_of(base, name), "weight", name)]


def _parameter_target(module: nn.Module, parameter_name: str, name: str) -> Target:
    """A parameter of a module, or the wrapper that it has already."""
    base, wrapper = _base_of(module, name), wrapped(module, parameter_name)
    if wrapper is not None:
        return Target(name, wrapper, wrapper.layer_type, parameter_name, name)
    parameter = stored_weight(base, READ, parameter_name)
    assert parameter is not None
    return Target(name, base, parameter_type(base, parameter, name), parameter_name, name)


def _parameters_named(model: nn.Module, names: Collection[str]) -> Iterator[Target]:
    """The parameters that `target_parameters` names, wrapped or not."""
    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            continue
        outer = path.replace(".base_layer", "")
        for parameter_name, _ in module.named_parameters(recurse=False):
            name = f"{outer}.{parameter_name}"
            if not is_named(names, name):
                continue
            holder = model.get_submodule(outer)
            if not outer or (isinstance(holder, DVoRALayer) and not isinstance(holder, ParamWrapper)):
                reason = _TARGETED_TWICE if outer else "it belongs to the model itself, which cannot be replaced"
                raise ValueError(f"target_parameters: {name.lstrip('.')} cannot be wrapped, because {reason}")
            yield _parameter_target(holder, parameter_name, name)


def outside_adapters(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """All modules by name, but those inside an adapter that is already there."""
    outside: list[tuple[str, nn.Module]] = []
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not (inside and name.startswith(inside)):
            outside.append((name, module))
            if isinstance(module, BaseTunerLayer):
                inside = (*inside, f"{name}.")
    return outside


def names_found(names: Iterable[str], model: nn.Module) -> set[str]:
    """The target names that some module has."""
    return _endings([name for name, _ in model.named_modules()]).intersection(names)


def _endings(paths: Iterable[str]) -> set[str]:
    split = [path.split(".") for path in paths]
    return {".".join(parts[start:]) for parts in split for start in range(len(parts))}


def _base_of(module: nn.Module, name: str) -> nn.Module:
    if isinstance(module, DVoRALayer):
        base: nn.Module = module.get_base_layer()
        return base
    if isinstance(module, BaseTunerLayer):
        raise TypeError(
            f"{name} already carries an adapter of another method ({type(module).__module__.split('.')[-2]}); merge or "
            "unload it first, or leave the layer out with exclude_modules"
        )
    return module


# ---- the checks


class PreparedTarget(NamedTuple):
    """What is known of a target before the model is changed."""

    target: Target
    adapted: AdaptedWeight
    fingerprint: list[float]


def check_settings(config: DVoRAConfig, adapter_name: object, model: nn.Module) -> None:
    """Refuse invalid settings, expressions that would match for too long, and invalid names of an adapter."""
    if config.file is not None and config.sizing() != config.file.sizing:
        config.forget_file()
    holders = [module for _, module in outside_adapters(model)]
    check_adapter_name(adapter_name, {name for holder in holders for name in (*holder._parameters, *holder._buffers)})
    # All names that settings are matched against: parameters may be adapted by themselves.
    names = {name for name, _ in chain(model.named_modules(), model.named_parameters())}
    config.check(names, bounded=config.file is not None)


def check_targets(targets: Sequence[Target], config: DVoRAConfig, model: nn.Module) -> None:
    """Refuse targets that match nothing; of some names that match nothing, warn with the closest that exist.

    Args:
        targets: the matched weights.
        config: whose `target_modules` are still as the user gave them.
        model: the model to adapt.

    Raises:
        NoMatchingPeftModuleError: (a ValueError) nothing matches.
    """
    modules = _endings([name for name, _ in model.named_modules()])
    parameters = _endings([name.replace(".base_layer", "") for name, _ in model.named_parameters()])
    messages = []
    for setting, present in (
        ("target_modules", modules),
        ("magnitude_modules", modules),
        ("target_parameters", parameters),
    ):
        names = getattr(config, setting)
        unmatched = ([] if targets else [names]) if isinstance(names, str) else sorted(set(names or ()) - present)
        if unmatched:
            # The search for close names is slow, and generic lists for many architectures are long.
            close = "; ".join(f"{name[:_SHOWN]!r}{_closest(name[:_SHOWN], model)}" for name in unmatched[:_NAMES_SHOWN])
            more = f" and {len(unmatched) - _NAMES_SHOWN} others" if len(unmatched) > _NAMES_SHOWN else ""
            hint = " (a parametrized weight is no parameter; name its layer in target_modules)"
            hint = hint if setting == "target_parameters" else ""
            messages.append(f"{setting}: nothing in the model is named {close}{more}{hint}")
    if messages and targets:
        warnings.warn(f"{'; '.join(messages)}. Only the {len(targets)} weights that match are adapted", stacklevel=4)
    elif messages:
        raise NoMatchingPeftModuleError("; ".join(messages))
    elif not targets:
        raise NoMatchingPeftModuleError(
            f"no layer is left to adapt: target_modules={config.target_modules!r} with exclude_modules="
            f"{config.exclude_modules!r}, layers_to_transform={config.layers_to_transform!r} and modules_to_save="
            f"{config.modules_to_save!r} match none of the model's layers"
        )


def _closest(name: str, model: nn.Module) -> str:
    types = (*LAYER_TYPES, nn.MultiheadAttention, DVoRALayer)
    adaptable = (n for n, m in outside_adapters(model) if isinstance(m, types) or is_linear_by_forward(m))
    layers = sorted({name.rpartition(".")[2] for name in adaptable})
    close = nearest(name.rpartition(".")[2], layers, most=3)
    if close:
        return f" (closest: {', '.join(close)})"
    return f" (layers that can be adapted: {', '.join(layers[:10]) or 'none'})"


def check_adapter(targets: Sequence[Target], config: DVoRAConfig, model: nn.Module) -> dict[str, PreparedTarget]:
    """Refuse an adapter that does not fit the model: by its sizes first, then by the weights.

    Args:
        targets: the matched weights.
        config: of the adapter; the fingerprint of its projections is filled in.
        model: the model to adapt.

    Returns:
        What is known of every target, by name.

    Raises:
        TypeError, ValueError: a layer, the model or the adapter's file does not fit.

    Warns:
        UserWarning: the base differs a little from that of the adapter, as another quantisation does.
    """
    if sharded := [name or "the model" for name, module in model.named_modules() if is_fully_sharded(module)]:
        raise ValueError(
            f"{sharded[0]} is sharded already (fully_shard), which would leave the adapter's gradients unsynchronised; "
            "adapt the model first, then call fully_shard"
        )
    _check_tokens(config, model)
    check_ranks(config, {target.name: target.rank(config) for target in targets})
    _check_projections(targets, config, model)
    shared = shared_projections(model, config.projection_seed, config.projection_init)
    prepared = {target.name: _prepare(target, config, shared) for target in targets}
    _check_base(prepared, config)
    return prepared


def _check_tokens(config: DVoRAConfig, model: nn.Module) -> None:
    """Refuse tokens to train that no layer has, which PEFT would find after the model was changed."""
    tokens = config.trainable_token_indices
    if tokens is None:
        return
    embeddings = _get_input_embeddings_name(model, "embed_tokens") or "embed_tokens"
    for name, indices in (tokens if isinstance(tokens, dict) else {embeddings: tokens}).items():
        tables = [getattr(layer, "weight", ()) for path, layer in outside_adapters(model) if is_named([name], path)]
        rows = min(map(len, tables), default=0)
        if not indices or len(set(indices)) < len(indices) or not all(0 <= index < rows for index in indices):
            raise ValueError(
                f"trainable_token_indices: {indices!r:.200} of {name!r}, expected different rows of a layer of that "
                f"name, which has {rows} here"
            )


def _check_projections(targets: Sequence[Target], config: DVoRAConfig, model: nn.Module) -> None:
    """Refuse matrices of PEFT's VeRA that are larger than any layer before they are drawn, or of other values."""
    if (sizes := vera_sizes(config.projection_init)) is None:
        return
    rank = max((config.rank_of(target.name) for target in targets), default=0)
    shapes = [tuple(parameter.shape) for parameter in model.parameters() if parameter.dim() > 1]
    stated = [size for module in model.modules() for size in sizes_of(module) if type(size) is int]
    largest = max(chain(stated, *shapes), default=0)
    if sizes.rank > rank or max(sizes.in_features, sizes.out_features) > largest:
        raise ValueError(
            f"projection_init={config.projection_init!r} is larger than any layer here: the largest has {largest} "
            f"features and rank {rank}"
        )
    config.check_fingerprint()


def _prepare(target: Target, config: DVoRAConfig, shared: SharedProjections) -> PreparedTarget:
    """Read a base weight once, for the norm constants and the fingerprint; refuse one that cannot be adapted."""
    base, kind, rank = target.base(), target.layer_type, target.rank(config)
    if config.dvora_dropout and kind.low_rank is None:
        raise ValueError(
            f"{target.name}: dvora_dropout={config.dvora_dropout} drops inputs of the update, and this weight "
            "is read by its module without inputs of its own; set dvora_dropout=0, or leave it out"
        )
    weight = target.weight()
    if kind.low_rank is not None:
        check_bias(bias_of(base, None), target.name)
    if config.fan_in_fan_out and isinstance(target.layer, nn.Linear):
        warnings.warn(
            f"fan_in_fan_out=True is ignored: {target.name} is a torch.nn.Linear, whose weight is (out, in)",
            stacklevel=4,
        )
    adapted = AdaptedWeight(
        weight,
        rank,
        shared=shared,
        alpha=None if rank == MAGNITUDE_ONLY else config.alpha_of(target.name),
        direction=checked_direction(config.direction),
        detach_norm=config.detach_norm,
        layout=kind.layout,
        groups=config.lambda_d_groups,
        padding_column=padding_column(base),
        readable=target.is_readable(),
        name=target.name,
    )
    return PreparedTarget(target, adapted, fingerprint_of(kind.layout.matrix(weight), adapted.w))


def _check_base(prepared: dict[str, PreparedTarget], config: DVoRAConfig) -> None:
    """Refuse a base model that the adapter was not made for."""
    changes = {}
    for name, there in (config.base_probes or {}).items():
        if name not in prepared:
            continue
        here = prepared[name].fingerprint
        if not alike(here, there):
            raise ValueError(
                f"{name}: the adapter was made for another base model: norm and random projections of the layer's "
                f"weight are {here} here and were {there} there, too far for a cast or a "
                "quantisation. To use it all the same, set base_probes=None in its configuration"
            )
        changes[name] = change(here, there)
    warn_of_changes(changes, stacklevel=5)


# ---- the change


def wrap(module: nn.Module, targets: Sequence[Target], parent: nn.Module) -> tuple[nn.Module, list[DVoRALayer]]:
    """A module in the wrappers of its targets, and the wrapper of each, which may be there already."""
    layers: list[DVoRALayer] = []
    for target in targets:
        if isinstance(target.layer, DVoRALayer):
            layers.append(target.layer)
        elif target.layer is _base_of(module, target.name):
            module = _wrapper(module, target, parent)
            layers.append(module)
        else:
            # Attention's output projection, a layer of its own.
            attention: Any = _base_of(module, target.name)
            attention.out_proj = _wrapper(target.layer, target, attention)
            layers.append(attention.out_proj)
    return module, layers


def _wrapper(module: nn.Module, target: Target, parent: nn.Module) -> DVoRALayer:
    """A new wrapper of a module, or of the wrappers of its other parameters."""
    if target.layer_type.low_rank is None:
        as_layer = is_read(target.layer) and not target.name.endswith(f".{target.parameter_name}")
        kind = ReadLinear if as_layer else ParamWrapper
        return kind(module, target.parameter_name, target.name, target.layer_type)
    if isinstance(parent, nn.TransformerEncoderLayer):
        return UnfusedLinear(module, target.name, target.layer_type)
    if target.layer_type.low_rank is linear:
        return DVoRALinear(module, target.name, target.layer_type)
    return DVoRALayer(module, target.name, target.layer_type)


def add_adapter(
    layer: DVoRALayer, adapter_name: str, config: DVoRAConfig, prepared: PreparedTarget, active_adapters: Sequence[str]
) -> None:
    """Add an adapter with its starting values to a layer; `active_adapters` are the model's."""
    vectors = prepared.adapted.initial_vectors(config.d_initial)
    if not config.init_weights:
        others = len(set(layer.dvora_adapted) - {adapter_name})
        vectors = _random_vectors(vectors, config.projection_seed, f"{others}/{layer.name}")
    layer.update_layer(
        adapter_name,
        prepared.adapted,
        vectors,
        trained=config.train,
        strength=config.strength_of(layer.name),
        dropout=config.dvora_dropout,
    )
    layer.fingerprint, layer.fingerprint_version = prepared.fingerprint, prepared.adapted.weight_version
    layer.set_adapter(list(active_adapters), inference_mode=config.inference_mode)
    layer._move_adapter_to_device_of_base_layer(adapter_name)


def _random_vectors(start: Vectors, seed: int, key: str) -> Vectors:
    """Vectors that are not the identity, a pure function of the seed, the layer's name and its number of adapters."""
    stream = _RANDOM_START_STREAM + int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big")
    magnitude, lambda_b, lambda_d = (
        torch.from_numpy(philox.uniform_row(seed, stream, row, vector.numel())).to(vector).view(vector.shape)
        for row, vector in enumerate(start)
    )
    return Vectors(start.magnitude * (1 + 0.1 * magnitude), lambda_b, 1 + lambda_d)
