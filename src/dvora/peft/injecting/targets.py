"""Which weights of a model an adapter is for: what names match, and the wrappers that go around them."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import NamedTuple

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ...checks import check_weight
from ...engines import full_tensor
from ...tensors import is_partitioned
from ..config import DVoRAConfig
from ..layers import low_rank
from ..layers.base_layer import readable_weight, stored_weight
from ..layers.layer import DVoRALayer, DVoRALinear
from ..layers.layer_types import READ, LayerType, is_initialized, layer_type_of, parameter_type
from ..layers.param_wrapper import ParamWrapper, ReadLinear, UnfusedLinear, is_read, projections_of, wrapped

_TARGETED_TWICE = "its layer is targeted by target_modules too"


class Target(NamedTuple):
    """One weight to adapt."""

    name: str
    """Of the weight: by which rank and alpha patterns, fingerprints and messages name it."""
    layer: nn.Module
    """The layer that holds it, or the wrapper that it has already."""
    layer_type: LayerType
    parameter_name: str
    module_name: str
    """Of the module that was targeted."""

    def base(self) -> nn.Module:
        """The layer that holds the weight."""
        return _base_of(self.layer, self.name)

    def is_readable(self) -> bool:
        """Whether every pass can read the weight: it is not quantised, offloaded or partitioned (ZeRO-3)."""
        stored = stored_weight(self.base(), self.layer_type, self.parameter_name)
        return stored is not None and not stored.is_meta and not is_partitioned(stored)

    def weight(self) -> Tensor:
        """The base's own weight, as stored; gathered where it is sharded.

        Raises:
            TypeError, ValueError: it cannot be adapted.
        """
        if isinstance(self.layer, DVoRALayer):
            return full_tensor(self.layer.unmerged())
        if self.layer_type.low_rank is None:
            # Offloaded, it could be read here, but not when its module reads it.
            check_weight(self.layer.get_parameter(self.parameter_name), self.name)
        weight = full_tensor(readable_weight(self.layer, self.layer_type, self.parameter_name, self.name))
        check_weight(weight, self.name)
        return weight


def targets_in(module: nn.Module, name: str) -> list[Target]:
    """The weights of a targeted module: one, or all projections of an attention.

    Raises:
        TypeError: the module cannot be adapted, or carries an adapter of another method.
        ValueError: it changes its weight while it runs.
    """
    base = _base_of(module, name)
    if isinstance(base, nn.MultiheadAttention):
        inputs = [parameter_target(module, p, f"{name}.{p}") for p in projections_of(base)]
        both = [*inputs, *targets_in(base.out_proj, f"{name}.out_proj")]
        return [target._replace(module_name=name) for target in both]
    if isinstance(module, DVoRALayer):
        return [Target(name, module, module.layer_type, module.parameter_name, name)]
    if not is_initialized(base):
        check_weight(next(base.parameters()), name)
    return [Target(name, base, READ if is_read(base) else layer_type_of(base, name), "weight", name)]


def parameter_target(module: nn.Module, parameter_name: str, name: str) -> Target:
    """A parameter of a module, or the wrapper that it has already.

    Raises:
        TypeError: it has neither two nor three dimensions, or the module carries an adapter of another method.
    """
    base, wrapper = _base_of(module, name), wrapped(module, parameter_name)
    if wrapper is not None:
        return Target(name, wrapper, wrapper.layer_type, parameter_name, name)
    parameter = stored_weight(base, READ, parameter_name)
    assert parameter is not None
    return Target(name, base, parameter_type(base, parameter, name), parameter_name, name)


def wrap(
    module: nn.Module, name: str, parameter_name: str | None = None, parent: nn.Module | None = None
) -> tuple[nn.Module, list[DVoRALayer]]:
    """The module in its wrappers, and the wrapper of every weight that `targets_in` or `parameter_target` lists."""
    if parameter_name is not None:
        target = parameter_target(module, parameter_name, name)
        if isinstance(target.layer, DVoRALayer):
            return module, [target.layer]
        wrapper = ParamWrapper(module, parameter_name, name, target.layer_type)
        return wrapper, [wrapper]
    base = _base_of(module, name)
    if isinstance(base, nn.MultiheadAttention):
        layers: list[DVoRALayer] = []
        for projection in projections_of(base):
            module, added = wrap(module, f"{name}.{projection}", projection)
            layers += added
        base.out_proj, added = wrap(base.out_proj, f"{name}.out_proj")  # type: ignore[assignment]
        return module, layers + added
    if isinstance(module, DVoRALayer):
        return module, [module]
    if is_read(base):
        layer: DVoRALayer = ReadLinear(base, "weight", name, READ)
        return layer, [layer]
    layer_type = layer_type_of(base, name)
    if isinstance(parent, nn.TransformerEncoderLayer):
        layer = UnfusedLinear(base, name, layer_type)
    elif layer_type.low_rank is low_rank.linear:
        layer = DVoRALinear(base, name, layer_type)
    else:
        layer = DVoRALayer(base, name, layer_type)
    return layer, [layer]


def outside_adapters(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules by name, but those inside an adapter that is already there."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not (inside and name.startswith(inside)):
            yield name, module
            if isinstance(module, BaseTunerLayer):
                inside = (*inside, f"{name}.")


def find_targets(model: nn.Module, is_targeted: Callable[[str], bool], config: DVoRAConfig) -> list[Target]:
    """The weights that PEFT is about to ask adapters for.

    Args:
        model: the model to adapt.
        is_targeted: whether a module, by its name, is targeted.
        config: which may name parameters, too.

    Raises:
        TypeError, ValueError: one of them cannot be adapted.
    """
    modules = [(name, module) for name, module in outside_adapters(model) if name and is_targeted(name)]
    targets = {target.name: target for name, module in modules for target in targets_in(module, name)}
    parameters = list(parameters_named(model, config.target_parameters or ()))
    called = {target.module_name for target in targets.values() if target.layer_type.low_rank is not None}
    for parameter in parameters:
        if parameter.name.rpartition(".")[0] in called:
            raise ValueError(f"target_parameters: {parameter.name} cannot be wrapped, because {_TARGETED_TWICE}")
    return [*targets.values(), *(target for target in parameters if target.name not in targets)]


def parameters_named(model: nn.Module, names: Collection[str]) -> Iterator[Target]:
    """The parameters that `target_parameters` names, wrapped or not.

    Raises:
        TypeError: one has neither two nor three dimensions.
        ValueError: one belongs to the model itself instead of a module in it, or to a layer that is adapted as a whole.
    """
    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            continue
        outer = path.replace(".base_layer", "")
        for parameter_name, _ in module.named_parameters(recurse=False):
            name = f"{outer}.{parameter_name}"
            if not matches(names, name):
                continue
            holder = model.get_submodule(outer)
            if not outer or (isinstance(holder, DVoRALayer) and not isinstance(holder, ParamWrapper)):
                reason = _TARGETED_TWICE if outer else "it belongs to the model itself, which cannot be replaced"
                raise ValueError(f"target_parameters: {name.lstrip('.')} cannot be wrapped, because {reason}")
            yield parameter_target(holder, parameter_name, name)


def names_found(names: Iterable[str], model: nn.Module) -> set[str]:
    """The target names that some module has."""
    return _endings(name for name, _ in model.named_modules()).intersection(names)


def parameter_names_found(names: Iterable[str], model: nn.Module) -> set[str]:
    """The target names that some parameter has."""
    return _endings(name.replace(".base_layer", "") for name, _ in model.named_parameters()).intersection(names)


def names_in(model: nn.Module) -> set[str]:
    """All names that settings are matched against: of modules, and of parameters that may be adapted by themselves."""
    return {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}


def matches(names: Collection[str] | str | None, path: str) -> bool:
    """Whether a path is one of the names, ends in one of them, or matches them as a regular expression."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names or ())


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
