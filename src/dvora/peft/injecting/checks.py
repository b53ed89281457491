"""Checks that run before a model is changed: names that match nothing, weights that cannot be adapted.

PEFT replaces layers one by one, so a later error would leave the model partly adapted.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Sequence
from itertools import chain

from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.other import ModulesToSaveWrapper, _get_input_embeddings_name
from torch import Tensor, nn

from ...matrices.interface import SharedProjections
from ...matrices.vera import vera_sizes
from ...tensors import is_fully_sharded
from ..config import DVoRAConfig
from ..config_checks import check_adapter_name
from ..expressions import check_expressions
from ..layers.base_fingerprint import alike, change, warn_of_changes
from ..layers.layer import DVoRALayer, shared_projections
from ..layers.layer_types import LAYER_TYPES, is_linear_by_forward, sizes_of
from ..state.checked_values import check_file, check_fits, check_ranks
from .inject import PreparedTarget, prepare, rank_of
from .targets import Target, matches, names_found, names_in, outside_adapters, parameter_names_found

_NAMES_SHOWN, _SHOWN = 20, 100
"""Names, and characters of one, that a message repeats."""


def check_settings(config: DVoRAConfig, adapter_name: object, model: nn.Module) -> None:
    """Refuse invalid settings, expressions that would match for too long, and invalid names of an adapter.

    Raises:
        TypeError, ValueError: a setting or the name is of the wrong type or out of range.
    """
    if config.file is not None and config.sizing() != config.file.settings:
        config.forget_file()
    if config.awaited is not None:
        config.awaited = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    holders = [module for _, module in outside_adapters(model)]
    check_adapter_name(adapter_name, {name for each in holders for name in (*each._parameters, *each._buffers)})
    config.check()
    check_expressions(vars(config), names_in(model))
    check_file(config)


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
    """
    check_model(config, model)
    check_ranks(config, {target.name: rank_of(target, config) for target in targets})
    check_projections(targets, config, model)
    shared = shared_projections(model, config.projection_seed, config.projection_init)
    prepared = check_weights(targets, config, shared)
    sizes = {name: (each.adapted.out_features, each.adapted.rank) for name, each in prepared.items()}
    check_fits(config, sizes, _saved_whole(config, model))
    return prepared


def check_projections(targets: Sequence[Target], config: DVoRAConfig, model: nn.Module) -> None:
    """Refuse matrices of PEFT's VeRA that are larger than any layer, before they are drawn, or of another fingerprint.

    Raises:
        ValueError: they are larger than the model, or not those of the adapter.
    """
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


def check_targets(targets: Sequence[Target], config: DVoRAConfig, model: nn.Module) -> None:
    """Refuse targets that match nothing; of some names that match nothing, warn with the closest that exist.

    Args:
        targets: the matched weights.
        config: whose `target_modules` are still as the user gave them.
        model: the model to adapt.

    Raises:
        NoMatchingPeftModuleError: (a ValueError) nothing matches.

    Warns:
        UserWarning: some names match nothing; as with generic lists for several architectures.
    """
    unmatched = [
        *_unmatched("target_modules", config.target_modules, model, matched=bool(targets)),
        *_unmatched("magnitude_modules", config.magnitude_modules, model, matched=bool(targets)),
        *_unmatched_parameters(config.target_parameters or [], model),
    ]
    if unmatched and targets:
        warnings.warn(f"{'; '.join(unmatched)}. Only the {len(targets)} weights that match are adapted", stacklevel=4)
    elif unmatched:
        raise NoMatchingPeftModuleError("; ".join(unmatched))
    if not targets:
        raise NoMatchingPeftModuleError(
            f"no layer is left to adapt: target_modules={config.target_modules!r} with exclude_modules="
            f"{config.exclude_modules!r}, layers_to_transform={config.layers_to_transform!r} and modules_to_save="
            f"{config.modules_to_save!r} match none of the model's layers"
        )


def check_weights(
    targets: Sequence[Target], config: DVoRAConfig, shared: SharedProjections
) -> dict[str, PreparedTarget]:
    """Refuse weights that cannot be adapted, and a base model that the adapter was not made for.

    Returns:
        What is known of every target, by name.

    Raises:
        TypeError: a layer's type or dtype is not supported, or it carries an adapter of another method.
        ValueError: a weight is on the meta device, not finite, or not the one the adapter was made for, or dropout is
            asked for where there are no inputs.

    Warns:
        UserWarning: the base differs a little, as another quantisation does.
    """
    prepared = {}
    for target in targets:
        if config.dvora_dropout and target.layer_type.low_rank is None:
            raise ValueError(
                f"{target.name}: dvora_dropout={config.dvora_dropout} drops inputs of the update, and this weight "
                "is read by its module without inputs of its own; set dvora_dropout=0, or leave it out"
            )
        prepared[target.name] = prepare(target, config, shared)
        if config.fan_in_fan_out and isinstance(target.layer, nn.Linear):
            warnings.warn(
                f"fan_in_fan_out=True is ignored: {target.name} is a torch.nn.Linear, whose weight is (out, in)",
                stacklevel=4,
            )
    known = {name: expected for name, expected in (config.base_probes or {}).items() if name in prepared}
    for name, expected in known.items():
        if not alike(prepared[name].fingerprint, expected):
            raise ValueError(
                f"{name}: the adapter was made for another base model: norm and random projections of the layer's "
                f"weight are {prepared[name].fingerprint} here and were {expected} there, too far for a cast or a "
                "quantisation. To use it all the same, set base_probes=None in its configuration"
            )
    warn_of_changes(
        {name: change(prepared[name].fingerprint, expected) for name, expected in known.items()}, stacklevel=5
    )
    return prepared


def check_model(config: DVoRAConfig, model: nn.Module) -> None:
    """Refuse a model that FSDP2 has sharded already, and tokens to train that it does not have.

    Raises:
        ValueError: a module was given to `fully_shard`, or a token's layer is not there.
    """
    if sharded := [name or "the model" for name, module in model.named_modules() if is_fully_sharded(module)]:
        raise ValueError(
            f"{sharded[0]} is sharded already (fully_shard), which would leave the adapter's gradients unsynchronised; "
            "adapt the model first, then call fully_shard"
        )
    _check_tokens(config, model)


def warn_of_kept_dtype(layers: Iterable[DVoRALayer]) -> None:
    """Warn that vectors stay in float32 although `autocast_adapter_dtype=False` asks for the base's half precision."""
    stored = [layer.stored() for layer in layers]
    if any(weight is not None and weight.dtype.itemsize < 4 for weight in stored):
        warnings.warn(
            "autocast_adapter_dtype=False is ignored: the vectors stay in float32, because half precision would round "
            "a magnitude by up to 0.4 %; they are kilobytes",
            stacklevel=4,
        )


def _saved_whole(config: DVoRAConfig, model: nn.Module) -> dict[str, nn.Module]:
    """The modules that PEFT is going to train and save whole, by name."""
    whole: dict[str, nn.Module] = {}
    for path, module in outside_adapters(model):
        ends = any(path.endswith(name) for name in config.modules_to_save or ())
        if ends and not path.startswith(tuple(f"{outer}." for outer in whole)):
            whole[path] = module.original_module if isinstance(module, ModulesToSaveWrapper) else module
    return whole


def _check_tokens(config: DVoRAConfig, model: nn.Module) -> None:
    """Refuse tokens to train that no layer has, which PEFT would find after the model was changed.

    Raises:
        ValueError: a layer is not there, or an index lies outside its table.
    """
    tokens = config.trainable_token_indices
    if tokens is None:
        return
    embeddings = _get_input_embeddings_name(model, "embed_tokens") or "embed_tokens"
    by_layer = tokens if isinstance(tokens, dict) else {embeddings: tokens}
    for name, indices in by_layer.items():
        tables = [layer for path, layer in outside_adapters(model) if matches([name], path)]
        if not (tables and indices):
            raise ValueError(
                f"trainable_token_indices: {indices} of {name!r}; the model must have a layer of that name, and the "
                "list at least one index"
            )
        for table in tables:
            weight = getattr(table, "weight", None)
            rows = len(weight) if isinstance(weight, Tensor) else 0
            if outside := [index for index in indices if not 0 <= index < rows]:
                raise ValueError(f"trainable_token_indices: {outside[0]} is no row of {name}, which has {rows}")
        if len(set(indices)) < len(indices):
            raise ValueError(f"trainable_token_indices of {name!r} has some of its {len(indices)} indices twice")


def _unmatched(setting: str, names: set[str] | list[str] | str | None, model: nn.Module, matched: bool) -> list[str]:
    """The message about names that no module has."""
    if isinstance(names, str):
        unmatched = [] if matched else [names]
    else:
        unmatched = sorted(set(names or ()) - names_found(names or (), model))
    if not unmatched:
        return []
    # The search for close names is slow, and generic lists for many architectures are long.
    close = "; ".join(f"{name[:_SHOWN]!r}{_closest(name[:_SHOWN], model)}" for name in unmatched[:_NAMES_SHOWN])
    more = f" and {len(unmatched) - _NAMES_SHOWN} others" if len(unmatched) > _NAMES_SHOWN else ""
    return [f"{setting}: nothing in the model is named {close}{more}"]


def _unmatched_parameters(names: list[str], model: nn.Module) -> list[str]:
    unmatched = sorted(set(names) - parameter_names_found(names, model))
    if not unmatched:
        return []
    return [
        f"target_parameters: no parameter is named {', '.join(unmatched[:_NAMES_SHOWN])} (a parametrized weight is no "
        "parameter; name its layer in target_modules)"
    ]


def _closest(name: str, model: nn.Module) -> str:
    types = (*LAYER_TYPES, nn.MultiheadAttention, DVoRALayer)
    adaptable = (n for n, m in outside_adapters(model) if isinstance(m, types) or is_linear_by_forward(m))
    layers = sorted({name.rpartition(".")[2] for name in adaptable})
    close = difflib.get_close_matches(name.rpartition(".")[2], layers, n=3)
    if close:
        return f" (closest: {', '.join(close)})"
    return f" (layers that can be adapted: {', '.join(layers[:10]) or 'none'})"
