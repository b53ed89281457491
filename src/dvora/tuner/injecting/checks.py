"""Checks that run before a model is touched: names that match nothing, weights that cannot be adapted.

PEFT replaces layers one by one, so an error half-way would leave a model half adapted.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.other import ModulesToSaveWrapper, _get_input_embeddings_name
from torch import Tensor, nn

from ...engines.tensor_parallel import is_fully_sharded
from ...matrices.interface import SharedProjections
from ...matrices.vera import vera_sizes
from ..adapter_folder import PEFT_PREFIX, VECTOR_PREFIX, check_vectors_held, layers_named
from ..config import DVoRAConfig
from ..config_checks import check_adapter_name
from ..expressions import check_expressions
from ..layers.base_fingerprint import alike, change, warn_of_changes
from ..layers.layer import DVoRALayer
from ..layers.layer_types import KINDS, is_linear_by_forward, sizes_of
from .inject import Measured, measure, projections_of
from .targets import Target, matches, names_found, names_in, outside_adapters, parameter_names_found

_NAMES_SHOWN, _SHOWN = 20, 100
"""Names, and characters of one, that a message repeats."""


def check_settings(config: DVoRAConfig, adapter_name: object, model: nn.Module) -> None:
    """Refuse settings that are none, or that would match a model's names without end, and names of no adapter.

    Raises:
        TypeError, ValueError: a setting or the name is of the wrong type or out of range.
    """
    if config.held_for is not None and config.sizing() != config.held_for:
        config.held = config.held_for = config.awaited = None
    if config.awaited is not None:
        config.awaited = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    holders = [module for _, module in outside_adapters(model)]
    check_adapter_name(adapter_name, {name for each in holders for name in (*each._parameters, *each._buffers)})
    config.check()
    check_expressions(vars(config), names_in(model))


def check_adapter(targets: Sequence[Target], config: DVoRAConfig, model: nn.Module) -> dict[str, Measured]:
    """Refuse an adapter that the model cannot have: by its sizes first, then by the weights.

    Args:
        targets: the matched weights.
        config: of the adapter, which is told the fingerprint of its projections.
        model: the model to adapt.

    Returns:
        What was measured of every target's base weight, by name.

    Raises:
        TypeError, ValueError: a layer, the model or the adapter's file does not fit.
    """
    check_model(config, model)
    check_ranks_held(targets, config)
    check_projections(targets, config, model)
    measured = check_weights(targets, config, projections_of(model, config))
    check_held(measured, config, model)
    return measured


def check_ranks_held(targets: Sequence[Target], config: DVoRAConfig) -> None:
    """Refuse ranks that no vector has in the file of a configuration that was read from one.

    Raises:
        ValueError: a rank is larger.
    """
    held = config.held
    if held is None:
        return
    longest = max(chain((0,), *(shape for key, shape in held.items() if key.endswith(f"{VECTOR_PREFIX}lambda_d"))))
    for target in targets:
        magnitude_only = matches(config.magnitude_modules, target.module_name)
        if not magnitude_only and config.rank_of(target.name) > longest:
            raise ValueError(
                f"the adapter lacks vectors of adapted layers: {target.name} has rank {config.rank_of(target.name)} in "
                f"its configuration, and no lambda_d in its file has more than {longest} values"
            )


def check_held(measured: Mapping[str, Measured], config: DVoRAConfig, model: nn.Module) -> None:
    """Refuse a configuration that was read from a file of other vectors or heads, while the model is as it was.

    Args:
        measured: of the weights that it adapts here.
        config: which knows what is in the file, if it was read from one.
        model: the model to adapt.

    Raises:
        ValueError: the file does not hold what the model needs, or more.
    """
    held = config.held or {}
    if not layers_named(held) & measured.keys():
        return  # there is no file, or it has names that PEFT converts
    check_vectors_held(held, {name: (each.adapted.out_features, each.adapted.rank) for name, each in measured.items()})
    whole: list[str] = []
    for path, module in outside_adapters(model):
        ends = any(path.endswith(name) for name in config.modules_to_save or ())
        if not ends or path.startswith(tuple(f"{outer}." for outer in whole)):
            continue
        whole.append(path)
        own = module.original_module if isinstance(module, ModulesToSaveWrapper) else module
        if missing := [key for key in own.state_dict() if f"{PEFT_PREFIX}{path}.{key}" not in held]:
            raise ValueError(
                f"the adapter's file lacks {path}.{missing[0]}, which modules_to_save={config.modules_to_save!r} says "
                "it trains"
            )


def check_projections(targets: Sequence[Target], config: DVoRAConfig, model: nn.Module) -> None:
    """Refuse matrices of PEFT's VeRA of sizes that no layer has, before they are drawn; their fingerprint is compared.

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
    """Refuse target names if nothing matches, and warn of those that match nothing, with the closest that exist.

    Args:
        targets: the matched weights.
        config: whose `target_modules` are still as the user gave them.
        model: the model to adapt.

    Raises:
        NoMatchingPeftModuleError: (a ValueError) nothing matches.

    Warns:
        UserWarning: some names match nothing; generic lists of names for several architectures do that.
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


def check_weights(targets: Sequence[Target], config: DVoRAConfig, shared: SharedProjections) -> dict[str, Measured]:
    """Refuse weights that cannot be adapted, and a base model that the adapter was not made for.

    Returns:
        What was measured of every target's base weight, by name.

    Raises:
        TypeError: a layer's type or dtype is not supported, or it carries an adapter of another method.
        ValueError: a weight is on the meta device, not finite, or not the one the adapter was made for, or dropout is
            asked for where there are no inputs.

    Warns:
        UserWarning: the base is another quantisation of the adapter's.
    """
    measured = {}
    for target in targets:
        if config.dvora_dropout and target.kind.low_rank is None:
            raise ValueError(
                f"{target.name}: dvora_dropout={config.dvora_dropout} drops inputs of the update, and this weight "
                "is read by its module without inputs of its own; set dvora_dropout=0, or leave it out"
            )
        measured[target.name] = measure(target, config, shared)
        if config.fan_in_fan_out and isinstance(target.layer, nn.Linear):
            warnings.warn(
                f"fan_in_fan_out=True is ignored: {target.name} is a torch.nn.Linear, whose weight is (out, in)",
                stacklevel=4,
            )
    known = {name: probes for name, probes in (config.base_probes or {}).items() if name in measured}
    for name, expected in known.items():
        if not alike(measured[name].probes, expected):
            raise ValueError(
                f"{name}: the adapter was made for another base model: norm and random projections of the layer's "
                f"weight are {measured[name].probes} here and were {expected} there, too far for a cast or a "
                "quantisation. To use it all the same, set base_probes=None in its configuration"
            )
    warn_of_changes({name: change(measured[name].probes, expected) for name, expected in known.items()}, stacklevel=5)
    return measured


def check_model(config: DVoRAConfig, model: nn.Module) -> None:
    """Refuse a model that FSDP2 holds already, as it would not know of the vectors, and one without tokens to train.

    Raises:
        ValueError: a module was given to `fully_shard`, or a token's layer is not there.
    """
    if sharded := [name or "the model" for name, module in model.named_modules() if is_fully_sharded(module)]:
        raise ValueError(
            f"{sharded[0]} is sharded already (fully_shard), which would leave the adapter's gradients unsynchronised; "
            "adapt the model first, then call fully_shard"
        )
    _check_tokens(config, model)


def warn_of_rows_left_alone(layers: Iterable[DVoRALayer], adapter_name: str) -> None:
    """Say which rows keep the base's outputs: rescaling would magnify the rounding of their bias."""
    rows = {layer.name: count for layer in layers if (count := layer.rows_left_alone(adapter_name))}
    if rows:
        most = max(rows, key=lambda name: rows[name])
        warnings.warn(
            f"rows that are tiny beside their bias keep the base's outputs where no pass can read the weight (it is "
            f"quantised, offloaded or known by its forward pass only): {sum(rows.values())} rows in {len(rows)} "
            f"layers, most in {most} ({rows[most]})",
            stacklevel=5,
        )


def warn_of_kept_dtype(layers: Iterable[DVoRALayer]) -> None:
    """Say that vectors stay in float32 where `autocast_adapter_dtype=False` asks for the base's half precision."""
    stored = [layer.stored() for layer in layers]
    if any(weight is not None and weight.dtype.itemsize < 4 for weight in stored):
        warnings.warn(
            "autocast_adapter_dtype=False is ignored: the vectors stay in float32, because half precision would round "
            "a magnitude by up to 0.4 %; they are kilobytes",
            stacklevel=4,
        )


def _check_tokens(config: DVoRAConfig, model: nn.Module) -> None:
    """Refuse tokens to train that no layer has; PEFT would find out after the model was changed.

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
    """What to say of names that no module has."""
    if isinstance(names, str):
        unmatched = [] if matched else [names]
    else:
        unmatched = sorted(set(names or ()) - names_found(names or (), model))
    if not unmatched:
        return []
    # A look at what is near takes long, and a list for many architectures has long names for none.
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
    kinds = (*KINDS, nn.MultiheadAttention, DVoRALayer)
    adaptable = (n for n, m in outside_adapters(model) if isinstance(m, kinds) or is_linear_by_forward(m))
    layers = sorted({name.rpartition(".")[2] for name in adaptable})
    close = difflib.get_close_matches(name.rpartition(".")[2], layers, n=3)
    if close:
        return f" (closest: {', '.join(close)})"
    return f" (layers that can be adapted: {', '.join(layers[:10]) or 'none'})"
